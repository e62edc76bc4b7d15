"""Makes data/tiny_llama: a Llama of real shape and tiny size, trained on `worlds`' stories, as a Hugging Face folder.

    python tools/make_tiny_model.py [FOLDER]

A few minutes on one thread. The same computer and library versions give the same bytes; another computer gives
other last bits, so tests compare with the dense model itself and never with stored logits.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "lib"))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # another number of threads adds in another order

VOCABULARY, DOCUMENTS, STEPS = 512, 8_000, 400


def main(arguments: list[str] | None = None) -> None:
    """Train the tokenizer and the model, and write both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "data/tiny_llama")
    folder = parser.parse_args(arguments).folder

    import torch

    from upcycling import DecoderLM, ModelConfig, TokenStream, TrainConfig, load_corpus, save_hf, train, train_tokenizer

    torch.set_num_threads(1)
    torch.manual_seed(0)
    corpus = load_corpus("worlds", documents=DOCUMENTS).filter(lambda row: row["domain"] == "stories")
    tokenizer = train_tokenizer(corpus["train"]["text"], VOCABULARY)
    with tempfile.TemporaryDirectory() as cache:
        streams = [TokenStream.build(corpus[split], tokenizer, cache) for split in ("train", "validation")]
    model = DecoderLM(
        ModelConfig.smol(vocab_size=VOCABULARY, d_model=64, n_layers=4, n_heads=8, n_kv_heads=4, d_ff=160, seq_len=256)
    )
    config = TrainConfig(steps=STEPS, batch_size=8, learning_rate=8e-3, warmup_steps=40, eval_every=100)
    train(model, *streams, config)
    save_hf(model, folder, tokenizer)
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"wrote {folder}: {model.num_parameters():,} parameters, {size:,} bytes")


if __name__ == "__main__":
    main()
