# ruff: noqa: F401
"""Show: what is looked at. Figures, interactive panels and one HTML file; data in, a picture out.

    from upcycling.show import plot_losses, history_curve
    plot_losses({"dense": history_curve(result.history)}, floor=0.39)

- `style.py`     what every figure shares: colours, text that any font can show, axes, strings as one artist; read first
- `charts.py`    lines, bars and dots over numbers: losses, routing over updates, costs, documents
- `seeds.py`     arms over seeds: a dot for each, a mark at their mean
- `experts.py`   matrices of which an expert is a column; `strips.py`: a text as its tokens
- `paths.py`     from layer to layer, and which experts work together
- `panel.py`     what a panel is: controls over a picture, and a still twin for saved files; look: `assets/panels.css`
- `explorer.py`  the panels `TokenExplorer`, `TrainingPlayback`, `CompareRouting`; `what_if.py`: `WhatIf`
- `report.py`    `save_report`: one HTML file to send to a colleague; its page is in `assets/`

Figures and panels take arrays, traces and results, and compute nothing that a claim rests on. What may never come in:
training, a measurement, a second way to draw what is drawn here already, or a view that exists only as a widget: each
panel has a still picture.
"""

from .charts import (
    history_curve,
    plot_latency,
    plot_length_bias,
    plot_losses,
    plot_memory_and_flops,
    plot_quotas,
    plot_saturation,
    plot_specialisation,
    plot_throughput,
)
from .experts import (
    plot_choices,
    plot_expert_classes,
    plot_expert_matrix,
    plot_knockout,
    plot_layer_loads,
    plot_load,
    weights_by_expert,
)
from .paths import plot_coactivation, plot_flow
from .seeds import plot_arms, plot_comparison, plot_differences, plot_jumps, plot_selected
from .strips import plot_token_losses, plot_token_strip
from .style import COLOURS, DASHES
