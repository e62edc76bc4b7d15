"""Recording: exactly what each router did, by hand; nothing changed; which tokens; errors."""

import html
import importlib
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tiny_transformers import LAYERS, MOE_FAMILIES, D, E, K, V, moe_model

from upcycling import DecoderLM, ModelConfig, MoEConfig, RoutingTrace, generate, record_routing
from upcycling.routing.hf_routers import (
    RULES,
    FoundRouter,
    find_routers,
    grouped_sigmoid,
    softmax_then_top_k,
    top_k_then_softmax,
)

FIELDS = ["logits", "probabilities", "expert_ids", "weights", "tokens", "sequence", "position"]

# ------------------------------------------------------------------------------------------------------------- models


def decoder_lm(seed=0, renormalize=True, **moe):
    torch.manual_seed(seed)
    settings = dict(num_experts=E, top_k=K, layers=(0, 2), renormalize=renormalize, router_std=0.5) | moe
    config = ModelConfig.smol(
        vocab_size=V, d_model=D, n_layers=LAYERS, n_heads=2, d_ff=12, seq_len=32, moe=MoEConfig(**settings)
    )
    return DecoderLM(config).eval()


RENORMALIZING_CHOICE = ["Qwen2Moe", "Qwen3Moe", "Olmoe", "FlexOlmo", "DeepseekV3"]
MODELS = {"DecoderLM": decoder_lm} | {family: lambda f=family, **kw: moe_model(f, **kw) for family in MOE_FAMILIES}
CASES = [(family, True) for family in MODELS] + [(family, False) for family in ["DecoderLM", *RENORMALIZING_CHOICE]]


def tokens(*shape, seed=1):
    return torch.randint(2, V, shape, generator=torch.Generator().manual_seed(seed))


def logits_of(output):
    return output.logits_BTV if hasattr(output, "logits_BTV") else output.logits


def hooks_of(model):
    return [
        (m._forward_hooks, m._forward_pre_hooks) for m in model.modules() if m._forward_hooks or m._forward_pre_hooks
    ]


# ------------------------------------------------------------------------------------------------- exactly what it did


@torch.no_grad()
def by_hand(router, rule, logits_NE):
    """probabilities_NE and the combine weight of every expert (0: not chosen), one token and one expert at a time."""
    softmax = rule is not grouped_sigmoid
    probabilities_NE = logits_NE.float().softmax(-1) if softmax else logits_NE.float().sigmoid()
    weights_NE = torch.zeros_like(probabilities_NE)
    for n, p_E in enumerate(probabilities_NE):
        value = p_E if softmax else p_E + router.e_score_correction_bias
        candidates = list(range(len(p_E)))
        if not softmax:
            size = len(p_E) // router.num_group
            groups = [candidates[g * size : (g + 1) * size] for g in range(router.num_group)]
            groups.sort(key=lambda group: -sum(sorted((float(value[e]) for e in group), reverse=True)[:2]))
            candidates = [e for group in groups[: router.topk_group] for e in group]
        chosen = sorted(candidates, key=lambda e: -value[e])[: router.top_k]
        if rule is top_k_then_softmax:
            weights_NE[n, chosen] = logits_NE[n, chosen].float().softmax(-1)
            continue
        divisor = p_E[chosen].sum() + (0 if softmax else 1e-20) if getattr(router, "norm_topk_prob", True) else 1
        weights_NE[n, chosen] = p_E[chosen] / divisor * getattr(router, "routed_scaling_factor", 1)
    return probabilities_NE, weights_NE


def spread(expert_ids, weights, num_experts):
    """The combine weight of every expert, 0 where it was not chosen."""
    return torch.zeros(*weights.shape[:-1], num_experts).scatter(-1, expert_ids, weights.float())


@pytest.mark.parametrize("family, renormalize", CASES)
def test_trace_is_what_the_routers_did_by_hand(family, renormalize):
    model, x_BT = MODELS[family](renormalize=renormalize), tokens(2, 5)
    routers, inputs = find_routers(model), {}
    for router in routers:
        router.module.register_forward_hook(lambda m, args, out, layer=router.layer: inputs.update({layer: args[0]}))
    with record_routing(model) as trace, torch.no_grad():
        model(x_BT)
    dense = {"DecoderLM": (1,), "Qwen2Moe": (1,), "DeepseekV3": (0,), "Glm4Moe": (0,), "Dots1": (0,)}.get(family, ())
    assert trace.layers == tuple(layer for layer in range(LAYERS) if layer not in dense)
    assert len(trace) == 10 and trace.num_experts == E and trace.top_k == K
    assert trace.tokens.tolist() == x_BT.flatten().tolist()
    assert trace.sequence.tolist() == [0] * 5 + [1] * 5 and trace.position.tolist() == [*range(5), *range(5)]
    assert [getattr(trace, name).dtype for name in FIELDS] == [torch.float32] * 2 + [torch.int64, torch.float32] + [
        torch.int64
    ] * 3
    for i, router in enumerate(routers):
        x_ND = inputs[router.layer].reshape(-1, D)
        logits_NE = F.linear(x_ND, router.module.weight, getattr(router.module, "bias", None))
        rule = RULES.get(type(router.module).__name__, softmax_then_top_k)
        holder = router.holder
        if family == "DecoderLM":
            holder = SimpleNamespace(top_k=K, norm_topk_prob=renormalize)
        probabilities_NE, weights_NE = by_hand(holder, rule, logits_NE)
        assert torch.equal(trace.logits[i], logits_NE)
        assert torch.equal(trace.probabilities[i], probabilities_NE)
        assert torch.equal(spread(trace.expert_ids[i], trace.weights[i], E), weights_NE)
    sums = trace.weights.sum(-1)
    if family in RENORMALIZING_CHOICE or family == "DecoderLM":
        scale = 2.5 if family == "DeepseekV3" else 1
        assert torch.allclose(sums, torch.tensor(float(scale))) == renormalize


def test_top_k_of_this_model_by_numbers():
    """One token, logits that can be done in the head."""
    model = decoder_lm(num_experts=4, top_k=2, layers=(1,))
    with torch.no_grad():
        model.blocks[1].ffn.router.weight.zero_()
    model.blocks[1].ffn.router.register_forward_hook(lambda *_: torch.tensor([[1.0, 2.0, 4.0, 1.0]]).log())
    with record_routing(model) as trace:
        model(tokens(1, 1))
    torch.testing.assert_close(trace.probabilities[0, 0], torch.tensor([1.0, 2.0, 4.0, 1.0]) / 8)
    assert trace.expert_ids[0, 0].tolist() == [2, 1]
    torch.testing.assert_close(trace.weights[0, 0], torch.tensor([4.0, 2.0]) / 6)
    assert trace.layers == (1,)


def router_class(name):
    """A transformers router class by its name; the files are searched, so that only the one is imported."""
    import transformers

    for path in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        if f"\nclass {name}(" in path.read_text(encoding="utf-8"):
            return getattr(importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}"), name)
    return None


@pytest.fixture(scope="module")
def router_classes():
    return {name: router_class(name) for name in RULES}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_rule_of_the_table_is_its_class_bit_for_bit(router_classes, dtype):
    for (name, cls), renormalize in product(router_classes.items(), (True, False)):
        assert cls is not None, f"{name} is in the table but not in transformers"
        config = SimpleNamespace(
            num_experts_per_tok=K, num_local_experts=E, num_experts=E, n_routed_experts=E, hidden_size=D,
            norm_topk_prob=renormalize, n_group=4, topk_group=2, routed_scaling_factor=2.5,
        )  # fmt: skip
        torch.manual_seed(0)
        module = cls(config)
        for tensor in [*module.parameters(), *module.buffers()]:
            torch.nn.init.normal_(tensor)
        module.to(dtype)
        router = FoundRouter(0, "gate", module, module)
        output = module(torch.randn(50, D, dtype=dtype))
        again = router.rerouted(output, router.logits(output))
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(output, again, strict=True)), name
        probabilities_NE, weights_NE = by_hand(module, RULES[name], output[0])
        assert torch.equal(router.probabilities(output[0]), probabilities_NE), name
        tolerance = dict(rtol=3e-7 if dtype is torch.float32 else 1e-2, atol=0)
        torch.testing.assert_close(spread(output[2], output[1], E), weights_NE, **tolerance, msg=name)


# ---------------------------------------------------------------------------------------------------- nothing changes


@pytest.mark.parametrize("family", MODELS)
def test_recording_changes_no_output_and_leaves_no_hook(family):
    model, x_BT = MODELS[family](), tokens(2, 6)
    before = hooks_of(model)
    for mode in (model.eval, model.train):
        mode()
        plain = logits_of(model(x_BT))
        with record_routing(model) as trace:
            recorded = logits_of(model(x_BT))
        assert torch.equal(plain, recorded) and len(trace) == 12
    assert hooks_of(model) == before == []
    assert not trace.logits.requires_grad


def test_gradients_are_the_same_and_recording_does_not_see_the_recomputation():
    for family, checkpointing in product(["DecoderLM", "Qwen3Moe", "Mixtral"], ("none", "reentrant", "not reentrant")):
        gradients = []
        for recording in (False, True):
            model, x_BT = MODELS[family]().train(), tokens(2, 6)
            if family == "DecoderLM":
                model.gradient_checkpointing = checkpointing != "none"
            elif checkpointing != "none":
                model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
            with record_routing(model) if recording else nullcontext() as trace:
                logits_of(model(x_BT)).square().sum().backward()
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        assert torch.equal(*gradients)
        assert len(trace) == 12, (family, checkpointing)


@pytest.mark.parametrize("family", ["DecoderLM", "GptOss"])
def test_hooks_go_and_recording_goes_on_after_an_exception(family):
    model, x_BT = MODELS[family](), tokens(2, 6)
    with pytest.raises(RuntimeError, match="mine"):
        with record_routing(model):
            raise RuntimeError("mine")
    assert hooks_of(model) == []
    with record_routing(model) as trace:
        model(x_BT)
        for bad in (torch.full((3, 4), V + 7), torch.ones(2, 3, 4, 5)):
            with pytest.raises((ValueError, IndexError, RuntimeError)):
                model(bad)
        handle = find_routers(model)[-1].module.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):  # in the middle of a forward
            model(x_BT)
        handle.remove()
        getattr(model, "model", model)(x_BT.flip(1))  # of transformers' class: the inner model, which the outer calls
    assert trace.tokens.tolist() == [*x_BT.flatten().tolist(), *x_BT.flip(1).flatten().tolist()]
    assert trace.sequence.unique().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("family", ["DecoderLM", "Mixtral"])
def test_contexts_nest(family):
    model, x_BT = MODELS[family](), tokens(2, 6)
    with record_routing(model) as outer:
        model(x_BT)
        with record_routing(model) as inner:
            model(x_BT[:1])
        model(x_BT[1:])
    assert (len(outer), len(inner)) == (24, 6)
    assert torch.equal(outer.logits[:, 12:18], inner.logits)
    assert inner.sequence.unique().tolist() == [0] and outer.sequence.unique().tolist() == [0, 1, 2, 3]
    assert hooks_of(model) == []


@pytest.mark.parametrize("family", ["DecoderLM", "Olmoe", "GraniteMoe", "DeepseekV3"])
def test_bfloat16(family):
    model, x_BT = MODELS[family]().to(torch.bfloat16), tokens(2, 6)
    with torch.no_grad():
        plain = logits_of(model(x_BT))
        with record_routing(model) as trace:
            assert torch.equal(logits_of(model(x_BT)), plain)
    assert trace.logits.dtype == trace.weights.dtype == torch.float32
    if family != "DeepseekV3":
        torch.testing.assert_close(trace.probabilities.sum(-1), torch.ones(trace.logits.shape[:2]))


def test_autocast_and_inference_mode():
    for family in ("DecoderLM", "Qwen3Moe"):
        model, x_BT = MODELS[family](), tokens(2, 6)
        with record_routing(model) as trace, torch.inference_mode():
            model(x_BT)
        trace.logits.requires_grad_().sum().backward()  # ordinary tensors
        with record_routing(model) as trace, torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            model(x_BT)
        assert trace.probabilities.dtype == torch.float32
        torch.testing.assert_close(trace.probabilities, trace.logits.softmax(-1), rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_compiled_models():
    torch._dynamo.reset()
    config = ModelConfig.smol(
        vocab_size=V, d_model=D, n_layers=2, n_heads=2, d_ff=10, seq_len=32, moe=MoEConfig(num_experts=4)
    )
    model, x_BT = DecoderLM(config).eval(), tokens(2, 6)
    with record_routing(model) as reference, torch.no_grad():
        model(x_BT)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        plain = compiled(x_BT).logits_BTV
        with record_routing(compiled) as trace:
            assert torch.equal(compiled(x_BT).logits_BTV, plain)
    assert torch.equal(trace.expert_ids, reference.expert_ids) and torch.equal(trace.tokens, reference.tokens)
    model.compile(backend="eager")
    with pytest.raises(ValueError, match="DecoderLM is compiled"), record_routing(model):
        pass
    mixtral = moe_model("Mixtral")
    compiled = torch.compile(mixtral, backend="eager")
    with pytest.raises(ValueError, match="OptimizedModule is compiled"), record_routing(compiled):
        pass
    compiled(x_BT)
    with record_routing(mixtral), pytest.raises(ValueError, match="compiled copy"):
        compiled(x_BT)
    torch._dynamo.reset()


# ---------------------------------------------------------------------------------------------------- whose tokens


def test_cached_decoding_continues_its_sequences():
    model, x_BT = decoder_lm(), tokens(2, 4)
    with record_routing(model) as trace:
        model(x_BT[:1])
        y_BT = generate(model, x_BT, 3)
    rest = [(1, 4), (2, 4), (1, 5), (2, 5)]
    expected = [(0, i) for i in range(4)] + [(s, i) for s in (1, 2) for i in range(4)] + rest
    assert [*zip(trace.sequence.tolist(), trace.position.tolist(), strict=True)] == expected
    for row in (0, 1):  # the last token was never an input
        assert trace.tokens[trace.sequence == row + 1].tolist() == y_BT[row, :-1].tolist()
    with record_routing(model) as uncached:
        model(y_BT[:, :-1])
    for row in (0, 1):  # the decisions are those of one forward over the whole
        a, b = trace.select(trace.sequence == row + 1), uncached.select(uncached.sequence == row)
        assert torch.equal(a.expert_ids, b.expert_ids)
        torch.testing.assert_close(a.logits, b.logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_generate_with_padding(family):
    model, x_BT = moe_model(family), tokens(2, 5)
    mask_BT = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    with record_routing(model) as trace:
        y_BT = model.generate(x_BT, attention_mask=mask_BT, max_new_tokens=6, do_sample=False)
    assert trace.tokens[trace.sequence == 0].tolist() == y_BT[0, 2:-1].tolist()
    assert trace.tokens[trace.sequence == 1].tolist() == y_BT[1, :-1].tolist()
    assert trace.position[trace.sequence == 0].tolist() == [*range(8)]
    assert trace.position[trace.sequence == 1].tolist() == [*range(10)]
    with record_routing(model) as whole, torch.no_grad():  # right padding; the same decisions
        model(y_BT[1:, :-1], attention_mask=torch.ones(1, 10))
        model(y_BT[1:, :-1], torch.tensor([[1] * 8 + [0] * 2]))
    assert len(whole) == 18
    cached, uncached = trace.select(trace.sequence == 1), whole.select(torch.arange(10))
    torch.testing.assert_close(cached.logits, uncached.logits, rtol=1e-4, atol=1e-5)


def test_manual_cache_of_transformers_and_two_interleaved():
    model, (a_BT, b_BT) = moe_model("GptOss"), (tokens(1, 4), tokens(2, 4, seed=2))
    with record_routing(model) as trace, torch.no_grad():
        a = model(a_BT, use_cache=True).past_key_values
        b = model(b_BT, use_cache=True).past_key_values
        for _ in range(2):
            model(a_BT[:, :1], past_key_values=a)
            model(b_BT[:, :1], past_key_values=b)
    assert trace.sequence.tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [0, 1, 2] * 2
    assert trace.position[12:].tolist() == [4, 4, 4, 5, 5, 5]
    with record_routing(model) as trace, torch.no_grad():  # filled before the recording began
        model(a_BT[:, :1], past_key_values=a)
    assert trace.position.tolist() == [6] and trace.sequence.tolist() == [0]


def test_inner_model_and_embeddings():
    model, x_BT = moe_model("Mixtral"), tokens(2, 3)
    with record_routing(model) as trace, torch.no_grad():
        model.model(x_BT)  # not the model that was given, but what is inside it
        model(inputs_embeds=model.get_input_embeddings()(x_BT))
        model.model(inputs_embeds=model.get_input_embeddings()(x_BT))
        for _ in range(2):
            model.model.layers[0].mlp(torch.randn(1, 4, D))  # by hand: no forward of the model
    assert trace.tokens.tolist() == x_BT.flatten().tolist() + [-1] * 12
    assert torch.equal(trace.logits[:, :6], trace.logits[:, 6:12]) and trace.sequence.max() == 5
    with record_routing(model.model) as inner, torch.no_grad():
        model(x_BT)
    assert torch.equal(inner.logits, trace.logits[:, :6])


class Wrapped(torch.nn.Module):
    """As DistributedDataParallel and others do it."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


@pytest.mark.parametrize("family", ["DecoderLM", "Mixtral"])
def test_wrapped_models(family):
    model, x_BT = MODELS[family](), tokens(2, 3)
    wrapper = Wrapped(model)
    with record_routing(wrapper) as trace, record_routing(model) as plain:
        wrapper(x_BT)
    assert all(torch.equal(getattr(trace, name), getattr(plain, name)) for name in FIELDS)


# ------------------------------------------------------------------------------------------------------------- errors


def test_models_that_cannot_be_recorded():
    import transformers

    dense = DecoderLM(ModelConfig.simple(vocab_size=V, d_model=D, n_layers=1, n_heads=2, d_ff=12, seq_len=8))
    with pytest.raises(
        ValueError, match=r"DecoderLM has no MoE layer; upcycle it first, for instance with upcycling\.upcycle$"
    ):
        with record_routing(dense):
            pass
    small = dict(vocab_size=V, hidden_size=D, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**small))
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no MoE layer; .*upcycling\.upcycle_pretrained$"):
        find_routers(llama)
    no_layers = transformers.Qwen2MoeConfig(**small, mlp_only_layers=[0, 1])
    with pytest.raises(ValueError, match="Qwen2MoeForCausalLM has no MoE layer"):
        find_routers(transformers.Qwen2MoeForCausalLM(no_layers))
    jamba = transformers.PhimoeConfig(**small, num_local_experts=4, num_key_value_heads=2)
    with pytest.raises(
        ValueError, match=r"holds Phimoe\w+, .*not known here; known are DecoderLM and.*DeepseekV3.*Mixtral"
    ):
        find_routers(transformers.PhimoeForCausalLM(jamba))
    with pytest.raises(TypeError, match="a tuple is not a model"):
        find_routers((llama, 1))
    two = torch.nn.ModuleList([moe_model("Mixtral"), moe_model("Mixtral")])
    with pytest.raises(ValueError, match="both in layer 0"):
        find_routers(torch.nn.ModuleDict({"a": two[0], "b": two[1]}))


def test_other_releases_of_transformers():
    model = moe_model("Mixtral")
    gate = model.model.layers[0].mlp.gate
    handle = gate.register_forward_hook(lambda m, args, out: out[::-1])  # the order that GraniteMoe once had
    with record_routing(model), pytest.raises(ValueError, match=r"MixtralTopKRouter did not return .* 5\.23; "):
        model(tokens(1, 2))
    handle.remove()


def test_a_part_of_a_model_is_refused():
    mlp = moe_model("Mixtral").model.layers[0].mlp
    with record_routing(mlp), pytest.raises(ValueError, match="MixtralSparseMoeBlock was given neither input_ids"):
        mlp(torch.randn(1, 4, D))
    ffn = decoder_lm().blocks[0].ffn
    with record_routing(ffn), pytest.raises(ValueError, match=r"MoELayer returned no LMOutput; give .* the DecoderLM"):
        ffn(torch.randn(1, 4, D))


def test_empty_trace_names_what_to_do():
    model = moe_model("Mixtral")
    with record_routing(model) as trace:
        assert len(trace) == 0 and "empty" in repr(trace) and "empty" in trace._repr_html_()
        for name in [*FIELDS, "num_experts", "top_k"]:
            with pytest.raises(ValueError, match="nothing was recorded: call the model"):
                getattr(trace, name)
        with pytest.raises(ValueError, match="nothing was recorded"):
            trace.save("never-written")
        model(tokens(1, 3), attention_mask=torch.zeros(1, 3))
        assert len(trace) == 0


def test_ragged_layers_and_forwards():
    model, x_BT = decoder_lm(), tokens(1, 3)
    model.blocks[2].ffn.top_k = 1
    with record_routing(model):
        with pytest.raises(ValueError, match="layer 2 takes 1 of 8 experts but layer 0 takes 3 of 8"):
            model(x_BT)
    with record_routing(model) as trace:
        for k in (3, 2):
            model.blocks[0].ffn.top_k = model.blocks[2].ffn.top_k = k
            with (
                pytest.raises(ValueError, match="used 2 experts per token, those before 3") if k == 2 else nullcontext()
            ):
                model(x_BT)
    assert len(trace) == 3


# ---------------------------------------------------------------------------------------------------- intervening


@pytest.mark.parametrize("family", MODELS)
def test_rerouted_removes_an_expert_and_the_model_follows(family):
    """What `intervene` builds on: expert 2 gone from every layer, by a hook on the router's module."""
    model, x_BT = MODELS[family](), tokens(4, 6)
    plain = logits_of(model(x_BT))
    routers = find_routers(model)

    def edit(router, change):
        return router.module.register_forward_hook(
            lambda m, args, out: router.rerouted(out, change(router.logits(out)))
        )

    handles = [edit(router, lambda logits_NE: logits_NE) for router in routers]
    assert torch.equal(logits_of(model(x_BT)), plain)
    for handle in handles:
        handle.remove()
    with record_routing(model) as trace:  # it sees the change, although it was here first
        for router in routers:
            edit(router, lambda logits_NE: logits_NE.masked_fill(torch.arange(E) == 2, -torch.inf))
            router.holder.top_k = 2
        changed = logits_of(model(x_BT))
    with record_routing(model) as later:
        model(x_BT)
    assert torch.equal(later.weights, trace.weights)
    assert trace.top_k == 2 and not (trace.expert_ids == 2).any() and (trace.probabilities[..., 2] == 0).all()
    assert torch.isfinite(changed).all() and not torch.equal(changed, plain)


@pytest.mark.parametrize("absent", [[0, 1], [2, 3]])
def test_absent_experts_of_a_group(absent):
    """DeepSeek's groups: one whose experts are all absent is passed over, also when every other score is negative."""
    holder = SimpleNamespace(
        top_k=2, num_experts=4, num_group=2, topk_group=1, norm_topk_prob=True, routed_scaling_factor=1.0,
        e_score_correction_bias=torch.full((4,), -5.0),
    )  # fmt: skip
    logits_NE = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    logits_NE[0, absent] = -torch.inf
    weights_NK, expert_ids_NK = grouped_sigmoid(holder, logits_NE)
    assert {*expert_ids_NK[0].tolist(), *absent} == {0, 1, 2, 3}
    torch.testing.assert_close(weights_NK.sum(), torch.tensor(1.0))


# ------------------------------------------------------------------------------------------------- the trace by itself


def small_trace():
    ids = torch.tensor([[[0, 1], [0, 2], [0, 1]], [[3, 2], [1, 0], [2, 3]]])
    logits = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    return RoutingTrace(
        layers=(0, 4), logits=logits, probabilities=logits.softmax(-1).numpy(), expert_ids=ids.int(),
        weights=torch.full((2, 3, 2), 0.5), tokens=[7, 8, 9], sequence=[0, 0, 1], position=[0, 1, 0],
    )  # fmt: skip


def test_trace_from_arrays_select_and_views():
    trace = small_trace()
    assert (len(trace), trace.num_experts, trace.top_k, trace.layers) == (3, 4, 2, (0, 4))
    assert trace.expert_ids.dtype == torch.int64 and trace.probabilities.dtype == torch.float32
    for keep in (trace.tokens != 8, [0, 2], torch.tensor([0, 2]), (trace.tokens != 8).numpy()):
        part = trace.select(keep)
        assert part.tokens.tolist() == [7, 9] and part.layers == (0, 4)
        assert part.expert_ids.tolist() == [[[0, 1], [0, 1]], [[3, 2], [2, 3]]]
        assert torch.equal(part.logits, trace.logits[:, [0, 2]])
    assert repr(trace) == "RoutingTrace(2 MoE layers (0, 4), 4 experts, top-2, 3 tokens of 2 sequences, in memory)"
    table = trace._repr_html_()
    assert html.escape(repr(trace)) in table and table == trace._repr_html_()
    assert "<td>0</td><td>2.00</td><td>1</td>" in table  # expert 0: 3 of 6 rows, the mean is 1.5; expert 3 has none
    assert "<td>4</td><td>1.33</td><td>0</td>" in table
    with pytest.raises(ValueError, match="mask has shape"):
        trace.select([True])
    with pytest.raises(ValueError, match="none of the trace's 3 tokens"):
        trace.select([False] * 3)


@pytest.mark.parametrize("name", FIELDS)
def test_trace_from_arrays_that_do_not_fit(name):
    good = small_trace()
    arrays = {field: getattr(good, field) for field in FIELDS} | {"layers": (0, 4)}
    shorter = arrays[name][:, :-1] if arrays[name].dim() == 3 else arrays[name][:-1]
    with pytest.raises(ValueError, match=r"has shape .* but there are 2 layers and \d tokens"):
        RoutingTrace(**arrays | {name: shorter})
    if arrays[name].dim() == 3:
        with pytest.raises(ValueError, match="has shape"):
            RoutingTrace(**arrays | {name: arrays[name][..., :-1]})
        with pytest.raises(ValueError, match="has shape"):
            RoutingTrace(**arrays | {name: arrays[name][0]})


def test_save_and_load(tmp_path):
    trace, path = small_trace(), tmp_path / "new" / "trace.safetensors"
    trace.save(path)
    loaded = RoutingTrace.load(path)
    assert loaded.layers == trace.layers
    assert all(torch.equal(getattr(loaded, name), getattr(trace, name)) for name in FIELDS)
    assert [*path.parent.iterdir()] == [path], "no temporary file stays"
    content = path.read_bytes()
    trace.select([0]).save(path)  # a loaded trace does not depend on the file
    assert len(loaded.logits[0]) == 3 and len(RoutingTrace.load(path)) == 1
    with pytest.raises(FileNotFoundError, match="there is no trace"):
        RoutingTrace.load(tmp_path / "absent")
    (tmp_path / "cut").write_bytes(content[:-40])
    (tmp_path / "foreign").write_text("hello")
    for bad in ("cut", "foreign"):
        with pytest.raises(ValueError, match="damaged or not a trace"):
            RoutingTrace.load(tmp_path / bad)
