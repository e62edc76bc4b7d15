"""The large sizes for real: the 100M-parameter model and its 372M MoE, and the first steps of the gpu presets."""

import itertools
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from upcycling.core.equivalence import check_causality, check_equivalence
from upcycling.core.routing import expert_load
from upcycling.core.transfer import upcycle
from upcycling.cost.references import REFERENCE
from upcycling.experiments.presets import PRESETS
from upcycling.experiments.series import load_series, new_model
from upcycling.training.loop import train

SHARED_DATA = Path(__file__).resolve().parents[4] / "shared" / "data"

pytestmark = pytest.mark.slow


def test_simple_100m_becomes_its_moe():
    dense = new_model(REFERENCE["simple-100m"], seed=0).eval()
    moe = upcycle(dense, REFERENCE["simple-100m-moe"].moe)
    assert dense.num_parameters() == 100_038_016
    assert moe.num_parameters() == 371_640_312
    assert moe.num_parameters(active=True) == 138_878_328
    tokens_BT = torch.randint(50257, (2, 16), generator=torch.Generator().manual_seed(0))
    report = check_equivalence(dense, moe, tokens_BT)
    assert report.passed, report
    assert report.max_abs_diff <= 1e-5
    with torch.no_grad():
        loads = [expert_load(routing) for routing in moe(tokens_BT).routings]
    assert len(loads) == 7
    assert all((load_E > 0).sum() > 2 for load_E in loads), "a random router uses more than one pair"
    assert check_causality(moe, tokens_BT[:1], cuts=1).passed


@pytest.fixture(scope="module")
def gpu_artifacts(tmp_path_factory):
    """A few real stories and GPT-2's tokenizer, as a user without a connection would give them."""
    tokenizer, stories = SHARED_DATA / "gpt2", SHARED_DATA / "tinystories_valid.jsonl"
    if not tokenizer.exists() or not stories.exists():
        pytest.skip(f"{SHARED_DATA} is not here")
    folder = tmp_path_factory.mktemp("gpu")
    with open(stories, encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in itertools.islice(file, 40)]
    corpus = folder / "stories.jsonl"
    corpus.write_text("".join(json.dumps(dict(text=text)) + "\n" for text in texts), encoding="utf-8")
    settings = {
        "UPCYCLING_ARTIFACTS": str(folder / "artifacts"),
        "UPCYCLING_CORPUS": str(corpus),
        "UPCYCLING_TOKENIZER": str(tokenizer),
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    yield
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


@pytest.mark.parametrize("name", ["gpu", "gpu-smol"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_first_steps_of_the_gpu_presets(gpu_artifacts, name, precision):
    """The preset's model, tokens and recipe, for two dense and two MoE updates of 64 tokens instead of 2,048.

    Three of the seven layers: AdamW on a whole MoE takes 6 and 9 GB. The whole of simple-100m runs forward above.
    """
    series = load_series(name)
    preset = PRESETS[name]
    model_config = replace(preset.model, seq_len=64, n_layers=3)
    few = dict(steps=2, batch_size=1, eval_every=0, eval_batch_size=8, log_every=1, warmup_steps=0, precision=precision)
    dense = new_model(model_config, seed=0)
    validation = series.validation_stream
    before = train(dense, series.train_stream, validation, replace(preset.dense, **few), progress=False, verbose=False)
    assert before.history[0]["val_loss"] == pytest.approx(math.log(50257), abs=0.5)
    assert before.final_loss < before.history[0]["val_loss"], "two updates already help"
    moe = upcycle(dense, preset.moe)
    del dense
    after = train(moe, series.train_stream, validation, replace(preset.sparse, **few), progress=False, verbose=False)
    rounding = 1e-4 if precision == "fp32" else 2e-2
    assert after.history[0]["val_loss"] == pytest.approx(before.final_loss, abs=rounding), "no jump at the boundary"
    assert after.history[0]["val_loss"] != after.final_loss < math.log(50257)
    assert 0.9 < after.history[-1]["aux_loss"] <= 8 / 2
    assert {parameter.dtype for parameter in moe.parameters()} == {torch.float32}, "bf16 is autocast's"
