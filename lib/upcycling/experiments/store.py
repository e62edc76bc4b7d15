"""One JSON file for a study: written whole after each run, read back where its settings are those of today.

result = begin(series, out, "rows", fraction=0.25)   # with the rows that `out` has already
result["rows"].append(...)
save(result, out)
"""

import datetime
import json
import platform
from dataclasses import asdict, replace
from pathlib import Path

import torch

from ..core.config import MoEConfig
from ..files import write_text
from .series import Series

# The fields of MoEConfig that every stored setting has.
_ALWAYS_STORED = (
    "num_experts", "top_k", "renormalize", "router_bias", "noisy", "layers", "router_std", "aux_weight", "z_weight",
)  # fmt: skip


def setting(series: Series) -> dict:
    """What a result depends on; a stored result holds for these settings only.

    A field of MoEConfig that was added later appears only where it is not at its default, so that results which were
    stored before it existed still hold.
    """
    preset = series.preset
    moe, default = asdict(preset.moe), asdict(MoEConfig())
    depends_on = {
        "model": preset.model.to_dict(),
        "moe": {name: moe[name] for name in moe if name in _ALWAYS_STORED or moe[name] != default[name]},
        "dense": asdict(replace(preset.dense, seed=0)),
        "sparse": asdict(replace(preset.sparse, seed=0)),
        "train_tokens": series.train_stream.key,
        "validation_tokens": series.validation_stream.key,
    }
    return json.loads(json.dumps(depends_on))


def begin(series: Series, out: str | Path | None, runs: str, **settings) -> dict:
    """A result with date, setting (`settings` besides the series'), corpus, machine and a list called `runs`.

    The list holds what the file `out` has, if that was made with this setting, and is empty otherwise. Raises
    ValueError for a file that is no study's result.
    """
    result = {
        "date": datetime.date.today().isoformat(),
        "setting": setting(series) | settings,
        "corpus": series.name,
        "machine": f"{platform.machine()}, one thread a run, torch {torch.__version__}",
        runs: [],
    }
    if out is not None and Path(out).exists():
        try:
            earlier = json.loads(Path(out).read_text(encoding="utf-8"))
            if earlier["setting"] == result["setting"]:
                result[runs] = earlier[runs]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{out} is no result of this study ({error!r}): move it away or write elsewhere"
            ) from error
    return result


def save(result: dict, out: str | Path | None, indent: int | None = None) -> None:
    """Replace the file `out` by `result`; nothing for None."""
    if out is not None:
        write_text(out, json.dumps(result, indent=indent) + "\n")
