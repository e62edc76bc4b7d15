"""Experiments: the steps that the notebooks share, and the studies behind them, over seeds and at equal budgets.

Read in this order:

- `presets.py`    the sizes: quick, laptop, gpu
- `series.py`     corpus -> tokenizer -> streams -> trained parent -> MoE, each step cached among the artifacts
- `arms.py`       what is compared, by name
- `budgets.py`    how many updates are equal tokens, equal FLOPs, equal seconds
- `compare.py`    arms from one parent, over budgets and seeds, beside the dense control (notebooks 04 and 06)
- `store.py`      a study's results, kept run by run; `workers.py`: its runs in several processes
- `results.py`    what such runs showed: paired differences, with intervals
- `knockouts.py`  specialisation, and what an expert's removal costs (notebook 05)
- `selected.py`   chosen documents against random ones (notebook 08)

A cached step never shifts a random number. What may never come in: a figure (show), or a claim without its control,
its seeds and its interval.
"""
