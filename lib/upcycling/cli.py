"""The command line: `python -m upcycling MODEL OUT` upcycles a pretrained model, `… inspect FOLDER` looks at one.

Exit status: 0 done, 1 it could not be done (one sentence on stderr says why), 2 the command was not understood.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
import warnings
from collections.abc import Iterable

EXAMPLE = """\
examples:
  python -m upcycling HuggingFaceTB/SmolLM2-135M smollm2-8x135m --experts 8 --top-k 2 --dry-run
  python -m upcycling ./my-llama ./my-mixtral --experts 8 --layers even --dtype bfloat16
  python -m upcycling inspect ./my-mixtral --text-file sample.txt

An interrupted conversion is continued by the same command."""
INSPECT_EXAMPLE = """\
examples:
  python -m upcycling inspect ./my-mixtral
  python -m upcycling inspect ./my-mixtral --text "Once upon a time there was a router."
  python -m upcycling inspect ./model-without-tokenizer --ids 5,17,3,88"""


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    inspecting = arguments[:1] == ["inspect"]
    parser = _inspect_parser() if inspecting else _convert_parser()
    options = parser.parse_args(arguments[1:] if inspecting else arguments)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # what they would say is for those who write models
    warnings.filterwarnings("ignore", "Initializing zero-element tensors")  # a shared expert of width 0
    try:
        return _inspect(options) if inspecting else _convert(options)
    except (OSError, ValueError) as error:
        from .hf.sources import on_one_line

        print(f"error: {on_one_line(' '.join(str(error).split()))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted" if inspecting else "interrupted; the same command continues", file=sys.stderr)
        return 1


def _convert_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m upcycling",
        description="Upcycle a pretrained dense language model into a Mixture-of-Experts of a stock transformers class "
        "with the same logits, file to file, in the memory of one layer. See also: python -m upcycling inspect --help",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model", metavar="MODEL", help="folder with safetensors weights, or a name on the Hugging Face hub"
    )
    parser.add_argument("out", metavar="OUT", help="the new folder")
    parser.add_argument("--experts", type=int, default=8, metavar="E", help="experts in a layer (default: 8)")
    parser.add_argument("--top-k", type=int, default=2, metavar="K", help="experts that a token uses (default: 2)")
    parser.add_argument(
        "--layers", type=_layers, default="all", metavar="LAYERS",
        help="which become MoE: all (default), even, odd, or 0,2,4; 8-15 is a range",
    )  # fmt: skip
    parser.add_argument(
        "--init", default="copy", choices=("copy", "noise"),
        help="experts are copies (default; the function does not change) or copies with noise (it does, a little)",
    )  # fmt: skip
    parser.add_argument(
        "--noise", type=_finite, default=0.05, metavar="STD",
        help="of --init noise, in units of each weight matrix's own standard deviation (default: 0.05)",
    )  # fmt: skip
    parser.add_argument(
        "--router-std", type=_finite, default=0.02, metavar="STD", help="of the routers' random weights (default: 0.02)"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights (default: as they are)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the routers and the noise (default: 0)")
    parser.add_argument(
        "--max-shard-size", type=_gigabytes, default=2.0, metavar="GB", help="largest weight file (default: 2)"
    )
    parser.add_argument("--no-verify", action="store_true", help="do not compare the result with the dense model")
    parser.add_argument(
        "--dry-run", action="store_true",
        help="print plan, sizes, memory and disk; write nothing (a model from the hub is downloaded all the same)",
    )  # fmt: skip
    return parser


def _inspect_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m upcycling inspect",
        description="Print an MoE's parameters, its router's class and settings and its receipt, and check on a text "
        "whether its routers have collapsed.",
        epilog=INSPECT_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="FOLDER", help="the model's folder, or a name on the Hugging Face hub")
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--text", help="route this text (default: a few sentences of several kinds)")
    text.add_argument("--text-file", metavar="FILE", help="route this file's text (UTF-8)")
    text.add_argument(
        "--ids", type=_ids, help="route these token ids, such as 5,17,3 (for a folder without a tokenizer)"
    )
    return parser


def _convert(options) -> int:
    import torch

    from .hf.convert import prepare

    layers = _layer_numbers(options.layers, options.model)
    job = prepare(
        options.model, options.out, options.experts, options.top_k, layers=layers,
        init=options.init, noise=options.noise, router_std=options.router_std, seed=options.seed,
        dtype=getattr(torch, options.dtype) if options.dtype else None,
        max_shard_size=int(options.max_shard_size * 1e9), verify=not options.no_verify,
    )  # fmt: skip
    print(job, flush=True)
    if options.dry_run:
        job.check_disk()
        return 0
    receipt = job.run(verify=not options.no_verify, progress=sys.stderr.isatty())
    print(receipt or "not verified (--no-verify)")
    print(f"wrote {job.out}")
    return 0


def _layers(text: str):
    """What --layers asks for: "all", "even", "odd" or a list of indices."""
    if text in ("all", "even", "odd"):
        return text
    layers = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d{1,4})(?:-(\d{1,4}))?\s*", part)  # no model has 10,000 layers
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if last < first:
            raise argparse.ArgumentTypeError(f"{text!r} is none of all, even, odd, or indices such as 0,2,4-7")
        layers += range(first, last + 1)
    return layers


def _layer_numbers(choice, model: str) -> Iterable[int] | None:
    """The indices of the MoE layers; None for all."""
    if choice not in ("even", "odd"):
        return None if choice == "all" else choice
    from .hf.sources import naming, open_source, read_config

    folder = open_source(model)
    with naming(folder / "config.json"):
        return range(choice == "odd", read_config(folder).num_hidden_layers, 2)


def _ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is no list of token ids such as 5,17,3") from None


def _gigabytes(text: str) -> float:
    size = _finite(text)
    if not 1e-9 <= size <= 1e9:
        raise argparse.ArgumentTypeError(f"{text} is no size in GB: give a number above 0, such as 2 or 0.5")
    return size


def _finite(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text!r} is no finite number")
    return number


def _inspect(options) -> int:
    from .hf.inspection import inspect_folder

    text = options.text
    if options.text_file:
        try:
            with open(options.text_file, encoding="utf-8") as file:
                text = file.read()
        except UnicodeDecodeError as error:
            raise ValueError(f"{options.text_file} is not a text in UTF-8 ({error})") from error
    for line in inspect_folder(options.folder, text=text, ids=options.ids):
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
