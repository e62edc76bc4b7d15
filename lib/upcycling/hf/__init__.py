"""Pretrained models of Hugging Face: a dense one in, a stock MoE with the same logits out; and our DecoderLM both ways.

Read `plan.py` first (which MoE class, with which settings, or why none), then one family in `families/`, then
`upcycle_pretrained.py`, which carries a plan out in memory; the rest as it is needed.

- `sources.py`             a model's folder or hub name: configuration, model, tokenizer; none of its code is run
- `weight_files.py`        safetensors files, read one tensor at a time
- `families/`              which class computes a dense family, from which tensors
- `plan.py`                the decision, printed; reads no weights
- `upcycle_pretrained.py`  a plan carried out in memory
- `convert.py`, `output/`  the same from folder to folder, in the memory of one tensor, resumable
- `receipt.py`             `verify`: do two models compute the same? `layerwise.py`: for those too large to load
- `inspection.py`          what is in an MoE's folder, and do its routers work?
- `decoder_lm/`            our DecoderLM as one of transformers' classes, and back
- `continued.py`           training an upcycled model on; `selection_bias.py`: the bias that transformers never moves

Nothing here trains by itself or knows the series of notebooks, and no pickle is ever opened.
"""
