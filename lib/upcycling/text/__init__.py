"""Text: from documents to batches of token ids.

Read in this order: `tokenizer` (a byte-level BPE: train, load, encode), `stream` (a split's documents as one memory-
mapped row of tokens, and the windows that training draws from it), then what stands behind them: `stream_files` (how a
stream gets onto the disk and survives a kill), `corpus` (`load_corpus`: the embedded one, the hub's, local files; the
entropy floor) and `worlds/` (the generator of the embedded corpus; its words and grammar are text files).

Imports nothing of the library but checks, files and tables. What may never come in: a model, a loss, or anything that
asks what the tokens are for.
"""
