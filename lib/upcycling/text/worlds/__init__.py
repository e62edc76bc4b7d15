"""`worlds`: the embedded corpus, a seeded generator of labelled documents whose exact surprisal is known.

Words, story grammar and sentence templates are text (`data/*.txt`, `data/*.json`: read and edit them there); the
modules say how documents are made of them. Read `grammar` first (templates, and the chooser that runs them), then
`world` (a world's facts, and `generate`); one module for each kind of document: `stories`, `arithmetic`, `code`,
`geography`, `dictionary`; below them `words` (the data files, plurals and articles) and `draw` (a world's own dice).

A document is written by plain Python against a chooser, which has three methods:

    say(text)                 write text that is already determined
    pick(choices)             choose one of weighted texts and write it
    pick_new(choices, used)   the same, among those that are not in `used`

`Writer` chooses at random and adds up -log p of each choice. The tests drive the same functions the other way: they try
every choice that agrees with a given text. Each text has exactly one derivation, so the sum is the text's exact
surprisal, in nats, for a reader who knows the world: no model can do better on average.

Reproducible to the byte everywhere: `random.Random.random` is the only source of randomness (Python guarantees its
sequence), weights are integers, and nothing depends on the order of a set or of a hash. What may never come in:
another source of chance, or a list of words in a module.
"""
