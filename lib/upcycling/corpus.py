"""`load_corpus`: the embedded corpus, two from the Hugging Face hub, or local files, all as one `datasets.DatasetDict`."""

from .worlds import World, WorldConfig, generate

WORLDS_DOCUMENTS = 9_500  # about 2M tokens of a 2,048-token BPE


def load_corpus(
    name="worlds",
    *,
    documents: int | None = None,
    validation_fraction: float = 0.05,
    seed: int = 0,
    cache_dir=None,
    world: "World | WorldConfig | None" = None,
):
    """A `datasets.DatasetDict` with "train" and "validation", split by document."""
    from datasets import Dataset

    rows = list(generate(WORLDS_DOCUMENTS if documents is None else documents, seed, world))
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    split = Dataset.from_dict(columns).train_test_split(validation_fraction, seed=seed)
    split["validation"] = split.pop("test")
    return split
