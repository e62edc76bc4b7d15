"""Training: one model, one run, in place, on Accelerate; dense and MoE take the same loop.

Read in this order; the first three belong to the evening path (README.md):

- `config.py`        `TrainConfig`, the settings of a run
- `optim.py`         the optimizer and the schedule, torch's and transformers'
- `loop.py`          `train`; one update is `Run.update`, what happens around it `Run.fit`
- `evaluation.py`    the mean loss over a whole stream
- `records.py`       where a run stands, its rows of history, why it stopped
- `checkpoint.py`    a model's file, all that resuming needs in one file, and the three files of a run's directory
- `preparation.py`   what is refused before the first update; Accelerate set up and let go

What may never come in: a loss (a model says what it minimises: `model.objective`), anything that knows routers or
Hugging Face models, or a second loop. Steps are optimizer updates; losses are nats per target.
"""
