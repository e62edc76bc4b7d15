"""Show: what is looked at. Figures, interactive panels and one HTML file; data in, a picture out.

- `style.py`          colours of experts, text that any font can show, strips of tokens; read first
- `training.py`       figures of the series: losses, schedules, comparisons
- `routing.py`        figures of what a router does; `flow.py`: from layer to layer; `over_training.py`: over updates
- `routers.py`        figures of notebook 06; `cost.py`: of notebook 09
- `panel.py`          what a panel is: controls over a picture, and a still twin for saved files
- `explorer.py`       the panels `TokenExplorer`, `TrainingPlayback`, `CompareRouting`; `what_if.py`: `WhatIf`
- `report.py`         `save_report`: one HTML file to send to a colleague; its page is in `assets/`

Figures and panels take arrays, traces and results, and compute nothing that a claim rests on. What may never come in:
training, a measurement, or a view that exists only as a widget: each panel has a still picture.
"""
