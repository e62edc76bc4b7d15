"""A dense transformers model and its stock MoE: equal logits, or a refusal that names what stands in the way."""

import copy
import json
import math
import os
import subprocess
import sys
from collections import Counter
from dataclasses import FrozenInstanceError, asdict, replace

import numpy as np
import pytest
import torch
from real_models import ROOT, SHARED, TINY_LLAMA, difference, needs_shared, stories, tolerance
from tiny_transformers import BASE, TINY

transformers = pytest.importorskip("transformers")
from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from upcycling.hf.decoder_lm import from_hf  # noqa: E402
from upcycling.hf.families import FAMILIES  # noqa: E402
from upcycling.hf.families.base import Refusal  # noqa: E402
from upcycling.hf.families.engine import hub_tensors  # noqa: E402
from upcycling.hf.plan import plan  # noqa: E402
from upcycling.hf.receipt import verify  # noqa: E402
from upcycling.hf.upcycle_pretrained import upcycle_pretrained  # noqa: E402

E, T = 4, 24
# Lfm2Moe adds 1e-6 to the sum of its sigmoid scores: a wide router, whose scores may be small, would show it
ROUTER_STD = {"lfm2": 0.02}

VARIANTS = [(kind, i) for kind in sorted(FAMILIES) for i in range(len(TINY.get(kind, [{}])))]


@pytest.fixture(autouse=True)
def _no_weights_drawn_twice(monkeypatch):
    """torch's own start of a layer is overwritten at once, by transformers' and then by make_dense or a file."""
    monkeypatch.setattr(torch.nn.Linear, "reset_parameters", lambda _: None)
    monkeypatch.setattr(torch.nn.Embedding, "reset_parameters", torch.nn.Embedding._fill_padding_idx_with_zero)


def tiny_values(kind, variant=0):
    return {**BASE, **copy.deepcopy(TINY.get(kind, [{}])[variant])}


def make_dense(kind, values):
    """A tiny dense model, every parameter random: matrices, biases and norms."""
    config = transformers.AutoConfig.for_model(kind, **values)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
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


# -------------------------------------------------------------------------------------------------- the same function


@pytest.mark.parametrize("top_k", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(4, marks=pytest.mark.slow)])
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
    names = ("num_experts_per_tok", "top_k_experts", "moe_k", "moe_topk")
    if top_k != 2:  # files differ in this number alone
        written = moe.config.to_dict()
        assert [k for name in names if (k := written.get(name)) is not None] == [top_k]
        return
    moe.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["num_experts"] == written["num_local_experts"] == E
    assert [k for name in names if (k := written.get(name)) is not None] == [top_k]
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
    assert receipt.max_abs_diff <= tolerance(logits(dense))
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
NEVER_READ = {"return_dict", "transformers_version", "model_type", "_name_or_path", "architectures"} | {
    "id2label",
    "label2id",
}
PER_LAYER = ("layer_types", "no_rope_layers")
NEEDED_TOO = {"enable_moe_block": dict(num_experts=4, top_k_experts=2, moe_intermediate_size=16)}
# One of each kind of rule; the others are slow.
FLIPPED_ALWAYS = {("llama", 0), ("qwen2", 1)}


def alternatives(name, value, config):
    """Changes to a configuration, each giving the field another value (and what that value needs)."""
    if name == "layer_types":
        window = {"use_sliding_window": True, "sliding_window": 5}
        window = {other: value for other, value in window.items() if hasattr(config, other)}
        kinds = ["full_attention", "sliding_attention"]
        lists = [[kind] * len(value) for kind in kinds] + [value[::-1], (kinds * len(value))[: len(value)]]
        return [{name: other} for other in lists] + [{name: lists[1], **window}, {name: lists[3], **window}]
    if name == "num_hidden_layers":
        lists = {other: getattr(config, other) for other in PER_LAYER if getattr(config, other, None) is not None}
        return [{name: 2 * value, **{other: 2 * many for other, many in lists.items()}}]
    changes = [{name: other, **NEEDED_TOO.get(name, {})} for other in other_values(name, value)]
    fields = config.to_dict()
    together = name in ("hidden_size", "num_attention_heads", "head_dim") and fields.get("head_dim")
    if together and not fields.get("per_layer_config"):
        width, heads, part = config.hidden_size, config.num_attention_heads, config.head_dim
        together = [(2 * width, heads, 2 * part), (width, 2 * heads, part // 2), (width, heads // 2, 2 * part)]
        sizes = [dict(zip(("hidden_size", "num_attention_heads", "head_dim"), one)) for one in together]
        changes += [size for size in sizes if size["num_attention_heads"] % config.num_key_value_heads == 0]
    if name in ("hidden_size", "num_attention_heads"):  # heads of the same width, for lists of rotation factors
        changes.append({other: 2 * getattr(config, other) for other in ("hidden_size", "num_attention_heads")})
    return changes


def other_values(name, value):
    if name == "rope_parameters":
        return rope_alternatives(value)
    if name == "problem_type":
        return ["regression"]
    if name == "dtype":
        return ["bfloat16"]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [2 * value, value // 2, value + 1] if value else [1]
    if isinstance(value, float):
        return [1.5 * value + 0.1, 0.5]
    if isinstance(value, str):
        return ["gelu_pytorch_tanh", "silu"] if "act" in name else [value + "_other"]
    if isinstance(value, list):
        return [value[::-1], [1 - one for one in value] if set(value) <= {0, 1} else []]
    return [5, True, 0.5, "gelu", "all", [3]] if value is None else [{}]


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


def outcome(kind, values, names):
    """'equal', 'refused' or 'not a dense model'; fails when the MoE computes something else."""
    try:
        dense = make_dense(kind, values)
        ids_BT = tokens(dense.config.vocab_size)
        expected = logits(dense, ids_BT)
        assert expected.isfinite().all() and expected.std() > 0
    except Exception:  # a value that transformers itself does not take, cannot run, or that leaves nothing to compare
        return "not a dense model"
    changed = {name: values[name] for name in names}
    try:
        moe = upcycle_pretrained(dense, E, 2)
    except Refusal as refusal:
        assert any(name in refusal.reason for name in names), f"{kind}: {changed} refused without a name: {refusal}"
        return "refused"
    if (length := moe.config.get_text_config().max_position_embeddings) < T:
        ids_BT = ids_BT[:, :length]
        expected = logits(dense, ids_BT)
    assert difference(expected, logits(moe, ids_BT)) <= 1e-5, f"{kind}: {changed}"
    return "equal"


@pytest.mark.parametrize(
    "kind,variant", [pytest.param(*v, marks=[] if v in FLIPPED_ALWAYS else pytest.mark.slow) for v in VARIANTS]
)
def test_flip_every_field(kind, variant, monkeypatch):
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # a thread for each tensor costs more than the tensor
    # nothing is generated here
    monkeypatch.setattr(transformers.GenerationConfig, "from_model_config", lambda _: transformers.GenerationConfig())
    values = tiny_values(kind, variant)
    config = transformers.AutoConfig.for_model(kind, **copy.deepcopy(values))
    untried, outcomes = [], {}
    for name, value in config.to_dict().items():
        if name in NEVER_READ:
            continue
        found = Counter()
        spare = (2, value + 1) if type(value) is int else (1, 0.5)  # for numbers that cannot take the values before
        for changes in alternatives(name, value, config):
            if (found["equal"] + found["refused"], changes) == (spare[0], {name: spare[1]}):
                continue
            if changes[name] != value:
                key = repr(changes)
                if key not in outcomes:
                    outcomes[key] = outcome(kind, {**copy.deepcopy(values), **copy.deepcopy(changes)}, list(changes))
                found[outcomes[key]] += 1
        if not found["equal"] + found["refused"]:
            untried.append(name)
    assert not untried, f"no other value of {untried} was tried: add some to alternatives()"


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_an_unknown_field_is_refused_by_name(kind):
    assert outcome(kind, {**tiny_values(kind), "made_up_scale": 2.0}, ["made_up_scale"]) == "refused"
    assert outcome(kind, {**tiny_values(kind), "made_up_scale": None}, ["made_up_scale"]) == "equal"


def test_the_fields_that_cannot_be_kept_are_refused_by_name():
    for kind, change, word in [
        ("llama", {"mlp_bias": True}, "mlp_bias"),
        ("granite", {"mlp_bias": True}, "mlp_bias"),
        ("llama", {"rope_interleaved": True}, "rope_interleaved"),
        ("llama", {"sliding_window": 8}, "sliding_window"),
        ("llama", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config"),
        ("mistral", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary"),
        ("olmo3", {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5},
                                       "sliding_attention": {"rope_type": "default", "rope_theta": 5e5}},
                   "layer_types": ["full_attention", "sliding_attention"]}, "rope_parameters"),
        ("qwen2", {"layer_types": ["sliding_attention", "full_attention"]}, "sliding_window"),
    ]:  # fmt: skip
        refused = plan({"model_type": kind, **tiny_values(kind), **change})
        assert refused.target is None, (kind, change)
        assert word in refused.reason
        assert word in str(refused) and "no stock class" in refused._repr_html_()


# ------------------------------------------------------------------------------------------ what the check has to catch


def damaged(moe, **changes):
    """The same weights under a changed configuration."""
    config = copy.deepcopy(moe.config)
    for name, value in changes.items():
        setattr(config, name, value)
    other = type(moe)(config).eval()
    other.load_state_dict(moe.state_dict())
    return other


@pytest.mark.parametrize(
    "kind,variant,changes",
    [
        ("qwen3", 0, {"norm_topk_prob": False}),
        ("qwen2", 0, {"norm_topk_prob": False}),
        ("llama", 1, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
        ("mistral", 0, {"sliding_window": None}),
        ("qwen2", 1, {"layer_types": ["full_attention"] * 2}),
        ("granite", 0, {"attention_multiplier": 1.0}),
        ("llama", 1, {"hidden_act": "silu"}),
        ("llama", 1, {"rms_norm_eps": 1e-6}),
    ],
)
def test_a_setting_that_was_lost_is_caught(kind, variant, changes):
    dense = tiny(kind, variant)
    moe = upcycle_pretrained(dense, E, 2)
    assert verify(dense, damaged(moe), length=T).passed
    receipt = verify(dense, damaged(moe, **changes), length=T)
    assert not receipt.passed
    assert receipt.max_abs_diff > 10 * receipt.tolerance
    assert "NOT the same function" in str(receipt)


def test_a_broken_weight_is_caught_and_the_receipt_stays_json():
    dense = tiny("llama")
    moe = upcycle_pretrained(dense, E, 1)
    with torch.no_grad():
        moe.model.layers[1].mlp.experts.down_proj[2, 0, 0] = float("nan")
    receipt = verify(dense, moe, length=T)
    assert not receipt.passed
    assert math.isnan(receipt.max_abs_diff)


def test_generation_that_differs_is_caught_even_where_the_probe_agrees(monkeypatch):
    dense = tiny("llama")
    moe = upcycle_pretrained(dense, E, 2)
    generate = type(moe).generate

    def other(self, ids_BT, **settings):
        made_BT = generate(self, ids_BT, **settings)
        made_BT[:, ids_BT.shape[1] + 2 :] += 1
        return made_BT % 97

    monkeypatch.setattr(type(moe), "generate", other)
    receipt = verify(dense, moe, length=T)
    assert receipt.max_abs_diff <= receipt.tolerance
    assert not receipt.greedy_equal and not receipt.passed


def test_what_a_receipt_says():
    dense = tiny("mistral", sliding_window=40)
    moe = upcycle_pretrained(dense, E, 2).train()
    receipt = verify(dense, moe, length=T)
    assert moe.training and not dense.training
    values = json.loads(json.dumps(asdict(receipt)))
    assert (values["source"], values["target"], values["passed"]) == ("MistralForCausalLM", "MixtralForCausalLM", True)
    assert values["settings"]["num_local_experts"] == E and values["settings"]["sliding_window"] == 40
    assert values["versions"]["transformers"] == transformers.__version__
    assert "sliding window of 40" in values["notes"][0]
    assert "| padded left | " in receipt.to_markdown()
    assert "the same function" in receipt._repr_html_()
    hostile = replace(receipt, target="<script>alert(1)</script>", checks={"<script>alert(2)</script>": 0.0})
    assert "<script" not in hostile._repr_html_()
    with pytest.raises(FrozenInstanceError):
        receipt.tolerance = 1.0


def test_a_bfloat16_model_is_compared_in_float32(tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    dense = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    moe = upcycle_pretrained(dense, E, 2)
    assert {p.dtype for p in moe.parameters()} == {torch.bfloat16}
    assert verify(dense, moe, length=T).passed
    assert {p.dtype for p in moe.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in upcycle_pretrained(tmp_path, E, 2, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}
    # A model that was cast afterwards has a rounded rotation table: another function than the file's.
    receipt = verify(tiny("llama").bfloat16(), moe, length=T)
    assert not receipt.passed and "rotary_emb.inv_freq" in receipt.notes[0]


# ------------------------------------------------------------------------------------------------------------ the plan


def test_the_plan_says_what_is_built():
    dense = tiny("qwen3")
    carried_out = plan(dense.config, E, 2, layers=[1])
    moe = upcycle_pretrained(dense, E, 2, layers=[1])
    assert (carried_out.source, carried_out.target) == ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM")
    assert carried_out.sizes.dense == sum(p.numel() for p in dense.parameters())
    assert carried_out.sizes.moe == sum(p.numel() for p in moe.parameters())
    ffn = 3 * 32 * 48
    assert carried_out.sizes.moe - carried_out.sizes.active == (E - 2) * ffn
    assert carried_out.sizes.bytes == 4 * carried_out.sizes.moe
    assert moe.config.mlp_only_layers == carried_out.settings["mlp_only_layers"] == [0]
    assert carried_out.settings["norm_topk_prob"] is True and carried_out.settings["num_experts"] == E
    assert set(carried_out.account) == set(dense.config.to_dict())
    assert set(carried_out.engines) == {"transformers", "vLLM", "llama.cpp"}
    text = str(carried_out)
    assert "layers [1]" in text and "(read, not run)" in text and "pools all layers" in text
    assert "intermediate_size" in carried_out._repr_html_()
    assert "<script" not in replace(carried_out, source="<script>alert(1)</script>")._repr_html_()
    with pytest.raises(FrozenInstanceError):
        carried_out.top_k = 3


@pytest.mark.parametrize("kind,variant", [("qwen2", 0), ("qwen2", 1), ("qwen3", 0), ("qwen3", 1)])
def test_some_layers_can_stay_dense(kind, variant):
    dense = tiny(kind, variant)
    moe = upcycle_pretrained(dense, E, 2, layers=[1])
    assert difference(logits(dense), logits(moe)) <= 1e-5
    assert not hasattr(moe.model.layers[0].mlp, "experts") and hasattr(moe.model.layers[1].mlp, "experts")


def test_a_class_without_dense_layers_says_so():
    assert "no dense layers" in plan(tiny("llama").config, layers=[0]).reason
    with pytest.raises(
        ValueError, match="LlamaForCausalLM has no stock MoE class: MixtralForCausalLM has no dense layers"
    ):
        upcycle_pretrained(tiny("llama"), layers=[0])


@pytest.mark.parametrize(
    "settings,message",
    [
        (dict(top_k=9), "top_k=9 with 8 experts; choose 1..8"),
        (dict(top_k=0), "top_k=0 with 8 experts"),
        (dict(num_experts=0), "with 0 experts"),
        (dict(layers=[2]), r"layers=\[2\]; choose some of 0..1"),
        (dict(layers=[]), "choose some of 0..1"),
        (dict(init="drop"), "init='drop' is unknown; choose one of 'copy', 'noise'"),
        (dict(router_std=-1.0), "cannot be negative"),
        (dict(router_std=float("nan")), "router_std=nan is .* must be finite"),
        (dict(noise=float("inf")), "noise=inf"),
        (dict(num_experts=8.0), "num_experts=8.0 is not a whole number"),
        (dict(num_experts=4097), "num_experts=4097 is too many"),
        (dict(top_k=True), "top_k=True is not a whole number"),
        (dict(layers=[0.0]), "layer=0.0 is not a whole number"),
        (dict(layers="all"), "layers='all' is no list"),
        (dict(layers=1), "layers=1 is no list"),
        (dict(seed=None), "seed=None is not a whole number"),
        (dict(dtype="float32"), "dtype='float32' is none of torch.float32"),
        (dict(dtype=torch.int8), "dtype=torch.int8 is none of"),
    ],
)
def test_settings_that_no_model_could_have(settings, message):
    with pytest.raises(ValueError, match=message):
        plan(tiny("llama").config, **settings)


def test_a_configuration_can_be_a_dict_or_a_folder(tmp_path):
    dense = tiny("llama")
    dense.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert plan(tmp_path).account.keys() == plan(dense.config).account.keys()
    assert plan(written).target == plan(str(tmp_path)).target == "MixtralForCausalLM"
    assert difference(logits(dense), logits(upcycle_pretrained(tmp_path, E, 2))) <= 1e-5
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no config.json"):
        plan(tmp_path)
    with pytest.raises(ValueError):
        plan({"model_type": "no_such_model"})


def test_an_old_config_json_keeps_its_rotation():
    """rope_theta beside rope_scaling, as written before transformers 5; the fields of SmolLM2's file."""
    old = {"model_type": "llama", **BASE, "rope_theta": 100000, "rope_scaling": None, "is_llama_config": True,
           "rope_interleaved": False, "torch_dtype": "bfloat16", "pretraining_tp": 1,
           "transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}}}  # fmt: skip
    carried_out = plan(old)
    assert carried_out.config.rope_parameters == {"rope_type": "default", "rope_theta": 100000}
    assert carried_out.dtype == torch.bfloat16


def test_numpy_integers_and_a_model_are_taken():
    sizes = plan(tiny("llama"), np.int64(E), np.int32(2), layers=np.arange(2))
    assert (sizes.num_experts, sizes.top_k, sizes.layers) == (E, 2, (0, 1))
    assert {type(value) for value in (sizes.num_experts, sizes.top_k, *sizes.layers)} == {int}


@pytest.mark.parametrize("text", ["[]", "null", "3", "{}", '{"model_type": ["llama"]}', '{"model_type": "new"}'])
def test_a_configuration_that_is_none_is_refused_in_one_line(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=f"{tmp_path}.* (no JSON object|model_type=)") as refused:
        plan(tmp_path)
    assert len(str(refused.value)) < 300
    with pytest.raises(ValueError, match=r"does not make a llama configuration.*hidden_size"):
        plan({"model_type": "llama", "hidden_size": "64"})
    with pytest.raises(TypeError, match="NoneType is no configuration"):
        plan(None)


def test_an_unknown_family_is_refused_with_those_that_are_known():
    refused = plan(transformers.BertConfig())
    assert refused.target is None and "bert" in refused.reason
    assert refused.nearest is None and "no decoder" in refused.reason
    assert "llama" in plan(transformers.BambaConfig()).nearest
    assert plan(transformers.MixtralConfig()).nearest is None


def test_widths_that_the_grouped_product_does_not_take():
    carried_out = plan({"model_type": "llama", **BASE, "intermediate_size": 50})
    assert any("set_experts_implementation('eager')" in note for note in carried_out.notes)
    assert not any("eager" in note for note in plan({"model_type": "llama", **BASE}).notes)
    dense = tiny("llama", intermediate_size=50)
    moe = upcycle_pretrained(dense, E, 2)
    assert difference(logits(dense), logits(moe)) <= 1e-5


# ---------------------------------------------------------------------------------------------------------- the weights


def test_the_new_model_shares_no_memory_and_changes_nothing():
    for kind in ("llama", "granite", "qwen2"):
        dense = tiny(kind).train()
        dense.generation_config.max_new_tokens = 7
        before = copy.deepcopy(dense.state_dict())
        random_state = torch.random.get_rng_state()
        moe = upcycle_pretrained(dense, 1, 1)
        assert torch.equal(torch.random.get_rng_state(), random_state)
        assert moe.training and moe.generation_config.max_new_tokens == 7
        memory = {p.untyped_storage().data_ptr() for p in dense.parameters()}
        assert not memory & {p.untyped_storage().data_ptr() for p in moe.parameters()}
        assert all(torch.equal(before[name], value) for name, value in dense.state_dict().items())


def test_a_seed_gives_a_layer_its_router_whatever_else_is_upcycled():
    dense = tiny("qwen3")

    def router(layer, **settings):
        return upcycle_pretrained(dense, E, 2, **settings).model.layers[layer].mlp.gate.weight.detach()

    assert torch.equal(router(1, seed=3), router(1, seed=3, layers=[1]))
    assert not torch.equal(router(1, seed=3), router(1, seed=4))
    assert not torch.equal(router(0, seed=3), router(1, seed=3))
    torch.testing.assert_close(10 * router(1, router_std=0.01), router(1, router_std=0.1))
    assert router(1).std() == pytest.approx(0.02, rel=0.3)


def test_noise_is_in_units_of_the_weight_and_differs_between_experts():
    for kind in ("llama", "granite"):
        dense = tiny(kind)
        moe = upcycle_pretrained(dense, E, 2, init="noise", noise=0.1)
        block = getattr(moe.model.layers[0], "block_sparse_moe", None) or moe.model.layers[0].mlp
        down, before = block.experts.down_proj.detach(), dense.model.layers[0].mlp.down_proj.weight.detach()
        for e in range(E):
            assert (down[e] - before).std() == pytest.approx(0.1 * before.std().item(), rel=0.1)
        assert not torch.equal(down[0], down[1])
        assert torch.equal(moe.model.norm.weight, dense.model.norm.weight)
        assert not verify(dense, moe, length=T).passed
        assert "not the same logits" in str(plan(dense.config, init="noise"))


def test_weights_that_do_not_fit_the_configuration_are_named():
    carried_out = plan(tiny("llama").config)
    names = carried_out.sources
    carried_out.check_sources([*names, "model.layers.0.self_attn.rotary_emb.inv_freq"])  # carries nothing
    with pytest.raises(ValueError, match=r"model.norm.weight is missing"):
        carried_out.check_sources(names - {"model.norm.weight"})
    with pytest.raises(ValueError, match=r"score.weight is in the weights but no part of LlamaForCausalLM"):
        carried_out.check_sources([*names, "score.weight"])
    tied = plan(tiny("llama", 1).config)
    tied.check_sources([*tied.sources, "lm_head.weight"])
    w1 = next(t for t in carried_out.tensors if t.name.endswith("experts.0.w1.weight"))
    with pytest.raises(ValueError, match=r"experts.0.w1.weight must have the shape \(48, 32\)"):
        w1.make(torch.zeros(32, 48))
    classifier = transformers.LlamaForSequenceClassification(tiny("llama").config)
    with pytest.raises(ValueError, match=r"lm_head.weight is missing"):
        upcycle_pretrained(classifier)


def test_a_head_that_should_be_tied_and_is_not_is_refused():
    dense = tiny("llama", 1)
    dense.lm_head.weight = torch.nn.Parameter(dense.lm_head.weight.clone() + 1)
    with pytest.raises(ValueError, match="tie_word_embeddings=False"):
        upcycle_pretrained(dense, E, 2)


def test_it_trains_with_the_balance_loss_and_generates_on_a_padded_batch():
    moe = upcycle_pretrained(tiny("llama"), E, 2).train()
    out = moe(input_ids=tokens(), labels=tokens())
    assert moe.config.output_router_logits and out.aux_loss.item() == pytest.approx(2, rel=0.3)
    out.loss.backward()
    assert all(p.grad is not None for p in moe.parameters())
    mask_BT = torch.ones(2, T, dtype=torch.long)
    mask_BT[0, :5] = 0
    made = moe.eval().generate(
        tokens(), attention_mask=mask_BT, max_new_tokens=3, pad_token_id=0, output_router_logits=False
    )
    assert made.shape == (2, T + 3)


# ------------------------------------------------------------------------------------------------- a folder of others


@pytest.fixture
def folder(tmp_path):
    """A tiny Llama with a tied head, as save_pretrained writes it; `rewrite(folder, change)` edits its weights."""
    tiny("llama", tie_word_embeddings=True).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def rewrite(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_code_in_a_folder_is_never_run(folder):
    """The one that the machine would ask about: "y" is the answer it would get."""
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nC = M = None\n")
    ask = (
        "import sys\nfrom upcycling import from_hf, plan, upcycle_pretrained\n"
        "for function in (plan, upcycle_pretrained, from_hf):\n"
        "    try:\n        function(sys.argv[1])\n"
        "    except ValueError as error:\n        print(error)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "lib")}
    run = subprocess.run(
        [sys.executable, "-c", ask, str(folder)], input="y\n" * 9, text=True, capture_output=True, env=environment
    )
    assert not (folder / "ran").exists()
    assert run.stdout.splitlines() == 3 * [
        f"{folder} has model_type='evil', which transformers does not know; its auto_map names code of its own, "
        "which is not run here"
    ], run.stderr
    # A known model that brings code of its own: transformers' class is taken.
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    assert type(upcycle_pretrained(folder, E, 2)).__name__ == "MixtralForCausalLM"
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("load", [upcycle_pretrained, from_hf])
def test_a_folder_whose_weights_do_not_fit_is_refused_by_the_tensor_s_name(folder, load):
    name = "model.layers.1.mlp.up_proj.weight"

    def refused(change, message):
        before = (folder / "model.safetensors").read_bytes()
        rewrite(folder, change)
        with pytest.raises(ValueError, match=message):
            load(folder)
        (folder / "model.safetensors").write_bytes(before)

    refused(lambda weights: weights.pop(name), f"{name} is missing")
    refused(lambda weights: weights.update(score=torch.zeros(3)), "score is in the weights but no part of")
    refused(lambda weights: weights.update({name: torch.zeros(5, 32)}), f"{name} has another shape")
    head = torch.zeros(97, 32)
    refused(
        lambda weights: weights.update({"lm_head.weight": head}), "lm_head.weight is not .*tie_word_embeddings=False"
    )


@pytest.mark.parametrize("load", [upcycle_pretrained, from_hf])
def test_a_tied_head_that_is_written_twice_and_old_rotation_tables_are_taken(folder, load):
    def change(weights):
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    rewrite(folder, change)
    ids_BT = tokens()
    with torch.no_grad():
        out = load(folder).eval()(ids_BT)
    got = out.logits if hasattr(out, "logits") else out.logits_BTV
    assert difference(logits(tiny("llama", tie_word_embeddings=True), ids_BT), got) <= 1e-5


@pytest.mark.parametrize("load", [upcycle_pretrained, from_hf])
def test_a_pickle_is_never_opened(folder, load):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"pytorch_model.bin, a pickle, .*save_pretrained"):
        load(folder)
    with pytest.raises(OSError, match="there is no folder"):
        load(folder / "config.json")
    with pytest.raises(OSError, match=r"pytorch_model\.bin"):
        load(folder / "pytorch_model.bin")


def test_what_is_no_model_with_weights_is_refused_in_a_sentence():
    dense = tiny("llama")
    moe = upcycle_pretrained(dense, E, 2)
    for other in (None, torch.nn.Sequential(dense), torch.compile(dense)):
        for ask in (lambda other=other: upcycle_pretrained(other), lambda other=other: verify(dense, other)):
            with pytest.raises(TypeError, match=f"not a {type(other).__name__}; of one that is compiled or wrapped"):
                ask()
    with torch.device("meta"):
        empty = transformers.LlamaForCausalLM(dense.config)
    for ask in (lambda: upcycle_pretrained(empty), lambda: verify(empty, moe)):
        with pytest.raises(ValueError, match="meta device"):
            ask()
    with pytest.raises(ValueError, match="the vocabularies differ, 96 tokens and 97"):
        verify(tiny("llama", vocab_size=96), moe)
    with pytest.raises(ValueError, match="id 500 but the models have 97"):
        verify(dense, moe, lambda text: {"input_ids": [1, 500]})


def test_weights_that_are_not_numbers_are_named():
    dense = tiny("llama")
    moe = upcycle_pretrained(dense, E, 2)
    dense.model.norm.weight.data[3] = float("nan")
    with pytest.raises(ValueError, match=r"model.norm.weight of the dense model has values that are not finite"):
        upcycle_pretrained(dense, E, 2)
    receipt = verify(dense, moe)
    assert not receipt.passed and any("dense model's own logits are not finite" in note for note in receipt.notes)
    dense = tiny("llama")
    dense.model.layers[0].mlp.up_proj.weight.data[0, 0] = 1e6
    with pytest.raises(ValueError, match=r"w3.weight has values too large for float16; choose dtype=torch.bfloat16"):
        upcycle_pretrained(dense, E, 2, dtype=torch.float16)


# ------------------------------------------------------------------------------------------------------ a real model


def test_a_real_model_tells_the_same_story(tmp_path):
    dense = transformers.AutoModelForCausalLM.from_pretrained(TINY_LLAMA)
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY_LLAMA)
    upcycle_pretrained(TINY_LLAMA, 8, 2).save_pretrained(tmp_path)
    moe = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    receipt = verify(dense, moe, tokenizer)
    assert receipt.passed, str(receipt)
    ids_BT = torch.tensor([tokenizer(stories()[0])["input_ids"][:100]])
    expected = logits(dense, ids_BT)
    assert difference(expected, logits(moe, ids_BT)) <= 1e-5
    prompt = tokenizer("Once upon a time", return_tensors="pt")
    dense_text, moe_text = (
        tokenizer.decode(model.generate(**prompt, max_new_tokens=100, do_sample=False)[0]) for model in (dense, moe)
    )
    assert dense_text == moe_text and len(moe_text) > 100
    moe.set_experts_implementation("eager")  # in float64 little is left, of norms in float32
    expected = logits(dense.double(), ids_BT)
    assert expected.abs().max() > 5 and difference(expected, logits(moe.double(), ids_BT)) <= 1e-6


def losses_on(models, tokenizer, texts):
    """([mean nats per token of each model], tokens, the largest difference between logits) over texts joined by BOS."""
    config = models[0].config
    ids_N = torch.tensor([i for text in texts for i in [config.bos_token_id, *tokenizer(text)["input_ids"]]])
    totals, count, apart = torch.zeros(len(models), dtype=torch.float64), 0, 0.0
    for window_T in ids_N.split(config.max_position_embeddings):
        if len(window_T) > 1:
            found = [logits(model, window_T[None])[0, :-1] for model in models]
            totals += torch.stack(
                [torch.nn.functional.cross_entropy(each.double(), window_T[1:], reduction="sum") for each in found]
            )
            count += len(window_T) - 1
            apart = max(apart, difference(*found))
    return (totals / count).tolist(), count, apart


@pytest.mark.parametrize(
    "folder, many, low, high",
    [
        (TINY_LLAMA, 12, 2.0, 2.5),
        pytest.param(SHARED / "stories260K", 12, 1.0, 1.6, marks=needs_shared),
        pytest.param(SHARED / "stories260K", None, 1.0, 1.6, marks=[needs_shared, pytest.mark.slow]),
    ],
)
def test_the_loss_on_real_stories_is_unchanged_to_five_decimals(folder, many, low, high):
    dense = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = stories()
    if folder != TINY_LLAMA:
        lines = (SHARED / "tinystories_valid.jsonl").read_text(encoding="utf-8").splitlines()
        texts = [json.loads(line)["text"] for line in lines]
    if many is None:  # each text that holds a token that none before it has
        seen = set()
        texts = [text for text in texts if (new := {*tokenizer(text)["input_ids"]} - seen) and not seen.update(new)]
    models = dense, upcycle_pretrained(dense, 8, 2)
    (before, after), count, apart = losses_on(models, tokenizer, texts[:many])
    assert count > 2000 and low < before < high
    assert abs(after - before) < 5e-6
    assert apart <= 1e-5  # of every single logit: a mean over many tokens hides what happens to a few
    print(f"{count} tokens: {before:.7f} and {after:.7f}, logits within {apart:.1e}")
