"""A dense transformers model and its stock MoE: equal logits, or a refusal that names what stands in the way."""

import copy
import json
from collections import Counter
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
from safetensors import safe_open  # noqa: E402

from upcycling.families import hub_tensors  # noqa: E402
from upcycling.pretrained import all_families, plan, upcycle_pretrained  # noqa: E402
from upcycling.receipt import verify  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
STORIES = ROOT.parent / "shared/data/stories260K"
VALID = ROOT.parent / "shared/data/tinystories_valid.jsonl"
needs_stories = pytest.mark.skipif(not STORIES.is_dir(), reason="the real tiny model is not here")
E, T = 4, 24
# Lfm2Moe adds 1e-6 to the sum of its sigmoid scores: a wide router, whose scores may be small, would show it
ROUTER_STD = {"lfm2": 0.02}

BASE = dict(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=64, pad_token_id=None, bos_token_id=None, eos_token_id=None,
)  # fmt: skip
TINY = json.loads((Path(__file__).parent / "tiny_families.json").read_text(encoding="utf-8"))
VARIANTS = [(kind, i) for kind in sorted(all_families()) for i in range(len(TINY.get(kind, [{}])))]


def tiny_values(kind, variant=0):
    return {**BASE, **copy.deepcopy(TINY.get(kind, [{}])[variant])}


def make_dense(kind, values):
    """A tiny dense model, every parameter random: matrices, biases and norms."""
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **values)).float()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            centre, scale = parameter.mean(), 0.2 if parameter.ndim > 1 else 0.4
            parameter.copy_(
                (centre if parameter.ndim == 1 else 0) + scale * torch.randn(parameter.shape, generator=generator)
            )
    return model.eval()


def tiny(kind, variant=0, **changes):
    return make_dense(kind, {**tiny_values(kind, variant), **changes})


def tokens(vocab=97, length=T, seed=0):
    return torch.randint(vocab, (2, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, ids_BT=None):
    return model(input_ids=tokens() if ids_BT is None else ids_BT, return_dict=True, use_cache=False).logits


def difference(a, b):
    return float((a.double() - b.double()).abs().max())


# -------------------------------------------------------------------------------------------------- the same function


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("kind,variant", VARIANTS)
def test_the_logits_are_equal_also_after_save_and_reload(kind, variant, top_k, tmp_path):
    dense = tiny(kind, variant)
    expected = logits(dense)
    assert expected.std() > 0.05
    moe = upcycle_pretrained(dense, E, top_k, router_std=ROUTER_STD.get(kind, 1.0))
    carried_out = plan(dense.config, E, top_k, router_std=ROUTER_STD.get(kind, 1.0))
    assert type(moe).__name__ == carried_out.target
    assert difference(expected, logits(moe)) <= 1e-5
    if carried_out.target != "Llama4ForCausalLM":  # which has its own
        for implementation in ("eager", "grouped_mm"):
            moe.set_experts_implementation(implementation)
            assert difference(expected, logits(moe)) <= 1e-5, implementation
    moe.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["num_experts"] == written["num_local_experts"] == E
    chosen = [written.get(name) for name in ("num_experts_per_tok", "top_k_experts", "moe_k", "moe_topk")]
    assert [k for k in chosen if k is not None] == [top_k]
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert shapes == {tensor.name: tensor.shape for tensor in carried_out.tensors}
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(moe)
    assert difference(expected, logits(again)) <= 1e-5


@pytest.mark.parametrize("kind,variant", VARIANTS)
def test_padded_cached_and_greedy_too(kind, variant):
    dense = tiny(kind, variant)
    receipt = verify(dense, upcycle_pretrained(dense, E, 2), length=T)
    assert receipt.passed, str(receipt)
    assert receipt.max_abs_diff <= 1e-5
    assert set(receipt.checks) == {"random ids", "padded right", "padded left", "with cache"}


@pytest.mark.parametrize("kind,variant", VARIANTS)
def test_the_experts_are_copies_and_the_routers_are_drawn(kind, variant):
    dense = tiny(kind, variant)
    weights = hub_tensors(dense)
    routers = []
    for tensor in plan(dense.config, E, 2, router_std=0.5).tensors:
        made = tensor.make(*(weights[name] for name in tensor.sources))
        if tensor.kind == "experts":
            assert all(torch.equal(made[0], made[e]) for e in range(E))
        if tensor.kind == "router" and tensor.shape[0] == E:
            routers.append(made)
    assert len(routers) == dense.config.num_hidden_layers
    assert torch.stack(routers).std() == pytest.approx(0.5, rel=0.25)
    assert not torch.equal(*routers[:2])


# ------------------------------------------------------------------------------------- every field: equal, or refused

# Provenance, and return_dict=False, with which transformers cannot run its own dense models.
NEVER_READ = {
    "return_dict",
    "transformers_version",
    "model_type",
    "_name_or_path",
    "architectures",
    "id2label",
    "label2id",
}


def alternatives(name, value):
    """Other values that a field of this name and value could have."""
    if name == "rope_parameters":
        return rope_alternatives(value)
    if name == "layer_types":
        kinds = ["full_attention", "sliding_attention"]
        return [[kind] * len(value) for kind in kinds] + [value[::-1], (kinds * len(value))[: len(value)]]
    if name == "problem_type":
        return ["regression"]
    if name == "dtype":
        return ["bfloat16"]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [2 * value, value // 2 or 1, value + 1]
    if isinstance(value, float):
        return [1.5 * value + 0.1, 0.0, 0.5]
    if isinstance(value, str):
        return ["gelu_pytorch_tanh", "relu"] if "act" in name else [value + "_other"]
    if value is None:
        return [5, True, 0.5, "gelu", [3]]
    return [[]] if isinstance(value, list) else [{}]


def rope_alternatives(rope):
    if any(isinstance(part, dict) for part in rope.values()):  # a set for each layer type
        changed = {kind: rope_alternatives(part) for kind, part in rope.items() if isinstance(part, dict)}
        one = [{**rope, kind: other} for kind, others in changed.items() for other in others]
        return one + [{**rope, **dict(zip(changed, others))} for others in zip(*changed.values())]
    theta = {"rope_theta": 777.0}
    return [
        {"rope_type": "default", **theta},
        {"rope_type": "linear", "factor": 3.0, **theta},
        {"rope_type": "dynamic", "factor": 3.0, **theta},
        {"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 8, **theta},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **theta,
         "original_max_position_embeddings": 16},
        {"rope_type": "default", "partial_rotary_factor": 0.5, **theta},
    ]  # fmt: skip


def outcome(kind, values, name):
    """'equal', 'refused' or 'not a dense model'; fails when the MoE computes something else."""
    try:
        dense = make_dense(kind, values)
        expected = logits(dense, tokens(dense.config.vocab_size))
        assert expected.isfinite().all() and expected.std() > 0
    except Exception:  # a value that transformers itself does not take, cannot run, or that leaves nothing to compare
        return "not a dense model"
    carried_out = plan(dense.config, E, 2)
    if carried_out.target is None:
        assert name in carried_out.reason, (
            f"{name}={values[name]!r} is refused without being named: {carried_out.reason}"
        )
        return "refused"
    ids_BT = tokens(dense.config.vocab_size, min(T, carried_out.exact_up_to or T))
    expected, got = logits(dense, ids_BT), logits(upcycle_pretrained(dense, E, 2), ids_BT)
    assert difference(expected, got) <= 1e-5 * max(1, float(expected.abs().max())), f"{kind}: {name}={values[name]!r}"
    return "equal"


@pytest.mark.parametrize(
    "kind,variant", [pytest.param(k, i, marks=[] if i == 0 else pytest.mark.slow) for k, i in VARIANTS]
)
def test_flip_every_field(kind, variant):
    values = tiny_values(kind, variant)
    config = transformers.AutoConfig.for_model(kind, **copy.deepcopy(values))
    untried = []
    for name, value in config.to_dict().items():
        if name in NEVER_READ:
            continue
        found = Counter()
        for other in alternatives(name, value):
            if other != value:
                found[outcome(kind, {**copy.deepcopy(values), name: copy.deepcopy(other)}, name)] += 1
        if not found["equal"] + found["refused"]:
            untried.append(name)
    assert not untried, f"no other value of {untried} was tried: add some to alternatives()"


@pytest.mark.parametrize("kind", sorted(all_families()))
def test_an_unknown_field_is_refused_by_name(kind):
    assert outcome(kind, {**tiny_values(kind), "made_up_scale": 2.0}, "made_up_scale") == "refused"
    assert outcome(kind, {**tiny_values(kind), "made_up_scale": None}, "made_up_scale") == "equal"
