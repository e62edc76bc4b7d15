"""Decoding: text from a model. Greedy or sampled, one prompt or many of different lengths.

- `generation.py`  `generate`: sampling, stopping, the key/value cache; works with every DecoderLM. Read this one
- `decode.py`      one token of one sequence on a CPU without modules, which `generate` takes where it is faster

The first is the definition; the second must give the same tokens and may be deleted. What may never come in: training,
a tokenizer (prompts are lists of ids and so is what comes back), or a model other than DecoderLM: transformers' own
`generate()` serves those.
"""
