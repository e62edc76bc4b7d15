"""Changed routing against the same model with other weights, knock-outs against subtraction by hand."""

import hashlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from upcycling.core.config import ModelConfig, MoEConfig
from upcycling.core.model import DecoderLM
from upcycling.core.moe import experts_loop
from upcycling.core.routers import ROUTERS
from upcycling.core.routing import route
from upcycling.core.transfer import upcycle
from upcycling.routing.intervention import (
    KnockoutTable,
    _by_domain,
    _chance_spreads,
    _margins,
    domain_losses,
    intervene,
    knockout,
    token_losses,
)
from upcycling.routing.record import record_routing

SIZES = dict(vocab_size=50, d_model=16, n_layers=3, n_heads=2, d_ff=8, seq_len=12)
MOE = MoEConfig(num_experts=6, top_k=2, router_std=1.0)


def new_model(seed=0, **changes) -> DecoderLM:
    torch.manual_seed(seed)
    moe = MoEConfig(**{"num_experts": 6, "top_k": 2, "router_std": 1.0, **changes})
    model = DecoderLM(ModelConfig.smol(**SIZES, init_std=0.3, moe=moe)).eval()
    return model


def tokens(seed=0, rows=4):
    windows = torch.randint(0, 50, (rows, 13), generator=torch.Generator().manual_seed(seed))
    return windows[:, :-1], windows[:, 1:].clone()


def fingerprint(model):
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    hooks = [len(module._forward_hooks) for module in model.modules()]
    return digest.hexdigest(), hooks, [block.ffn.top_k for block in model.blocks if hasattr(block.ffn, "top_k")]


def ids(model, tokens_BT):
    return [routing.expert_ids_NK for routing in model(tokens_BT).routings]


def test_nothing_asked_changes_nothing():
    model = new_model()
    expected = model(tokens()[0])
    with intervene(model) as same:
        out = model(tokens()[0])
    assert same is model
    assert torch.equal(out.logits_BTV, expected.logits_BTV)
    with intervene(model, remove=[], top_k=2, temperature=1.0):
        assert torch.equal(model(tokens()[0]).logits_BTV, expected.logits_BTV)


@pytest.mark.parametrize("renormalize", [True, False])
def test_removed_experts_are_replaced_by_the_next_best(renormalize):
    """The layer's output is what the rule gives for the remaining experts alone, computed by the definition."""
    model = new_model(renormalize=renormalize)
    layer, x_BTD = model.blocks[1].ffn, torch.randn(2, 12, 16)
    kept = [0, 2, 3, 5]
    with intervene(model, remove={1: [1, 4]}):
        y_BTD, routing = layer(x_BTD)
    few = route(layer.router(x_BTD.flatten(0, 1))[:, kept], 2, renormalize)
    assert torch.equal(routing.expert_ids_NK, torch.tensor(kept)[few.expert_ids_NK])
    assert torch.allclose(routing.weights_NK, few.weights_NK)
    expected_ND = experts_loop(layer.experts, x_BTD.flatten(0, 1), routing)
    assert torch.allclose(y_BTD.flatten(0, 1), expected_ND, atol=1e-6)
    assert (layer(x_BTD)[1].expert_ids_NK == 1).any(), "expert 1 had something to do"


def test_where_and_which():
    model, tokens_BT = new_model(), tokens()[0]
    before = ids(model, tokens_BT)
    with intervene(model, remove={1: [3]}):
        after = ids(model, tokens_BT)
        assert torch.equal(after[0], before[0])
        assert (before[1] == 3).any() and not (after[1] == 3).any()
    with intervene(model, remove=[3, 0]):
        assert all(not torch.isin(each, torch.tensor([0, 3])).any() for each in ids(model, tokens_BT))


def test_top_k_and_temperature():
    model, tokens_BT = new_model(), tokens()[0]
    (before, *_) = model(tokens_BT).routings
    with intervene(model, top_k=4, temperature=2.5):
        (after, *_) = model(tokens_BT).routings
    assert after.expert_ids_NK.shape == (48, 4)
    assert torch.equal(after.expert_ids_NK[:, :2], before.expert_ids_NK)
    assert torch.allclose(after.probabilities_NE, (before.logits_NE / 2.5).softmax(-1))
    assert torch.equal(ids(model, tokens_BT)[0], before.expert_ids_NK)


def test_noise_does_not_bring_a_removed_expert_back():
    model = new_model(noisy=True).train()
    with intervene(model, remove=[2]):
        for _ in range(5):
            assert all(not (each == 2).any() for each in ids(model, tokens()[0]))


def test_weights_and_state_stay_whatever_happens():
    model = new_model()
    before = fingerprint(model)
    with pytest.raises(RuntimeError, match="in between"):
        with intervene(model, remove=[1], top_k=3, temperature=0.5):
            model(tokens()[0])
            raise RuntimeError("something in between")
    assert fingerprint(model) == before
    with pytest.raises(ValueError, match="expert 6"):
        with intervene(model, remove={0: [1], 1: [6]}, top_k=3):
            pass
    assert fingerprint(model) == before


def test_nested():
    """Inner and outer together are one call; leaving the inner one gives the outer one back."""
    model, tokens_BT = new_model(), tokens()[0]
    with intervene(model, remove={0: [1, 2]}, temperature=2.0, top_k=3):
        outer = model(tokens_BT).logits_BTV
        with intervene(model, remove={0: [3], 1: [3, 4, 5]}, temperature=3.0, top_k=2):
            both = model(tokens_BT).logits_BTV
        assert torch.equal(model(tokens_BT).logits_BTV, outer)
        with pytest.raises(ValueError, match="layer 0 only 2 would remain, but each token needs top_k=3"):
            with intervene(model, remove={0: [3, 4]}):
                pass
    with intervene(model, remove={0: [1, 2, 3], 1: [3, 4, 5]}, temperature=6.0, top_k=2):
        assert torch.allclose(model(tokens_BT).logits_BTV, both, atol=1e-6)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(remove={7: [0]}), r"remove names layer 7, but the layers with experts are \[0, 1, 2\]"),
        (dict(remove={1: [6]}), "remove names expert 6 of layer 1; choose 0..5"),
        (dict(remove=[-1]), "remove names expert -1 of layer 0; choose 0..5"),
        (dict(remove=[0, 1, 2, 3, 4]), "of the 6 experts of layer 0 only 1 would remain, but each token needs top_k=2"),
        (dict(remove=list(range(6))), "only 0 would remain"),
        (dict(remove=[0, 3, 4, 5], top_k=3), "only 2 would remain, but each token needs top_k=3"),
        (dict(top_k=0), "top_k=0 but layer 0 has 6 experts; choose 1..6"),
        (dict(top_k=7), "top_k=7 but layer 0 has 6 experts; choose 1..6"),
        (dict(temperature=0), "temperature=0 must be a finite number above 0"),
        (dict(temperature=-1.0), "temperature=-1.0 must be"),
        (dict(temperature=float("nan")), "temperature=nan must be"),
        (dict(temperature=float("inf")), "temperature=inf must be"),
    ],
)
def test_errors(wrong, message):
    with pytest.raises(ValueError, match=message):
        with intervene(new_model(), **wrong):
            pass


def test_dense_model():
    dense = DecoderLM(ModelConfig.smol(**SIZES))
    for use in (lambda: intervene(dense).__enter__(), lambda: knockout(dense, {})):
        with pytest.raises(ValueError, match="DecoderLM has no MoE layer; upcycle it first"):
            use()


def test_compiled_model():
    """Compiled code does not look for hooks again, so an intervention could do nothing and nobody would know."""
    model = new_model()
    whole = torch.compile(model, backend="eager")
    model.blocks[1].compile(backend="eager")
    for compiled, name in ((whole, "OptimizedModule"), (model, "Block")):
        with pytest.raises(ValueError, match=f"{name} is compiled"), intervene(compiled, remove=[0]):
            pass


def test_layers_count_blocks():
    torch.manual_seed(0)
    model = DecoderLM(ModelConfig.smol(**SIZES, moe=MoEConfig(num_experts=4, layers=(2,)))).eval()
    with intervene(model, remove={2: [0]}):
        assert not (ids(model, tokens()[0])[0] == 0).any()
    with pytest.raises(ValueError, match=r"layer 0, but the layers with experts are \[2\]"):
        with intervene(model, remove={0: [0]}):
            pass


def test_token_losses():
    model = new_model(noisy=True).train()
    tokens_BT, targets_BT = tokens()
    targets_BT[1, 4:] = -100
    losses_BT = token_losses(model, tokens_BT, targets_BT)
    assert model.training, "as it was"
    model.eval()
    logits_BTV = model(tokens_BT).logits_BTV.detach()
    assert float(losses_BT[2, 3]) == pytest.approx(float(F.cross_entropy(logits_BTV[2, 3], targets_BT[2, 3])))
    assert torch.equal(losses_BT.isnan(), targets_BT == -100)
    assert float(losses_BT.nanmean()) == pytest.approx(model(tokens_BT, targets_BT).loss.item())
    assert not losses_BT.requires_grad


def domains():
    windows = {"a": tokens(1, rows=3), "b": tokens(2, rows=4), "c": tokens(3, rows=2)}
    windows["b"][1][0, 5:] = -100
    return windows


def test_knockout_by_hand():
    model, windows = new_model(), domains()
    state = torch.get_rng_state()
    table = knockout(model, windows)
    assert torch.equal(torch.get_rng_state(), state)
    assert (table.layers, table.domains) == ((0, 1, 2), ("a", "b", "c"))
    assert table.tokens_C.tolist() == [36, 41, 24]
    base = domain_losses(model, windows)
    assert table.base_loss_C.tolist() == pytest.approx(list(base.values()))
    with intervene(model, remove={1: [4]}):
        without = domain_losses(model, windows)
    assert base["b"] == pytest.approx(model(*windows["b"]).loss.item())
    for c, name in enumerate(windows):
        assert float(table.deltas_LEC[1, 4, c]) == pytest.approx(without[name] - base[name], abs=1e-6)
    assert torch.allclose(table.random_expert_LC, table.deltas_LEC.sum(1) / 6)


def test_copies_cost_nothing():
    """Freshly upcycled, the router may tell domains apart, but no expert knows more than the next."""
    torch.manual_seed(0)
    model = upcycle(DecoderLM(ModelConfig.smol(**SIZES, init_std=0.3)), MoEConfig(num_experts=4, top_k=2))
    table = knockout(model, domains())
    assert float(table.deltas_LEC.abs().max()) < 1e-6
    with intervene(model, remove=[0, 2], temperature=9.0):
        assert domain_losses(model, domains())["a"] == pytest.approx(float(table.base_loss_C[0]), abs=1e-6)


def test_errors_of_the_means():
    """Equal windows: the standard error is the windows' standard deviation over the square root of their number."""
    model, windows = new_model(), {"a": tokens(1, rows=5), "b": tokens(2, rows=5)}
    table = knockout(model, windows)
    with intervene(model, remove={0: [3]}):
        without_B = token_losses(model, *windows["b"]).mean(1)
    delta_B = without_B - token_losses(model, *windows["b"]).mean(1)
    assert float(table.errors_LEC[0, 3, 1]) == pytest.approx(float(delta_B.std() / 5**0.5), rel=1e-4)


def test_knockout_needs_domains_and_windows():
    for windows in ({"a": tokens()}, {"a": tokens(), "b": tokens(rows=1)}):
        with pytest.raises(ValueError, match="at least 2 of them, each with at least 2 windows"):
            knockout(new_model(), windows)


def test_worst_names_the_domain_with_the_widest_margin():
    table = KnockoutTable(
        deltas_LEC=torch.tensor([[[0.5, 0.1, 0.4], [-0.2, 0.3, -0.2], [-0.9, -0.8, -0.1]]]),
        errors_LEC=torch.tensor([[[0.03, 0.2, 0.04], [0.0, 0.0, 0.0], [0.1, 0.1, 0.1]]]),
        base_loss_C=torch.ones(3),
        tokens_C=torch.ones(3),
        layers=(4,),
        domains=("a", "b", "c"),
        chance_spreads=3.0,
    )
    first, second, last = table.worst()
    assert (first["layer"], first["expert"], first["domain"]) == (4, 1, "b")
    assert (second["expert"], second["domain"]) == (0, "a")
    assert (second["delta"], second["margin"], second["error"], second["spreads"]) == pytest.approx((0.5, 0.1, 0.05, 2))
    assert (first["margin"], first["error"]) == pytest.approx((0.3, 0.0))
    assert first["spreads"] > 1e30
    assert (last["expert"], last["margin"]) == (2, pytest.approx(-0.1)), "an expert whose removal helps serves nobody"


def test_chance_says_what_a_random_deal_gives():
    """Windows that differ by domain are told from windows that differ by themselves; an unused expert counts as 0."""
    generator = torch.Generator().manual_seed(0)
    domain_W, tokens_W = torch.arange(40) % 2, torch.full((40,), 10)
    noise_LEW = 5 + torch.randn(1, 3, 40, generator=generator, dtype=torch.float64)
    noise_LEW[0, 2] = 0
    chance = _chance_spreads(noise_LEW, tokens_W, domain_W)
    assert 1.8 < chance < 3.2, "the larger of two |t| of 38 degrees of freedom stays below 2.33 in 19 of 20"
    served_LEW = noise_LEW + 3 * domain_W * torch.tensor([1.0, 0.0, 0.0])[:, None]
    spreads_LE = _margins(*_by_domain(served_LEW, tokens_W, domain_W))[2]
    assert spreads_LE[0, 0] > 2 * _chance_spreads(served_LEW, tokens_W, domain_W)
    assert spreads_LE[0, 1] < chance
    assert spreads_LE[0, 2] == 0


# ------------------------------------------------------------------------------------------------ any set of experts

HEEDING = [None, *(kind for kind in ROUTERS if kind != "hash")]


@st.composite
def models_and_removals(draw):
    """(a model in float64, {layer: the experts to remove}): any rule that heeds scores, any set that leaves K."""
    kind = draw(st.sampled_from(HEEDING))
    num_experts = draw(st.integers(2, 6))
    top_k = draw(st.integers(1, num_experts))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    moe = MoEConfig(
        num_experts=num_experts, top_k=top_k, router=kind, renormalize=draw(st.booleans()), router_std=1.0,
        router_bias=draw(st.booleans()),
    )  # fmt: skip
    sizes = SIZES | dict(n_layers=2, d_model=8, d_ff=4)
    model = DecoderLM(ModelConfig.smol(**sizes, init_std=0.3, moe=moe)).double().eval()
    if kind == "selection_bias":
        for block in model.blocks:
            block.ffn.rule_state.selection_bias_E.normal_()
    expert = st.integers(0, num_experts - 1)
    removals = {
        layer: draw(st.lists(expert, max_size=num_experts - top_k, unique=True))
        for layer in draw(st.sets(st.integers(0, 1)))
    }
    return model, removals


def weights_by_expert(routing):
    return torch.zeros_like(routing.probabilities_NE).scatter(1, routing.expert_ids_NK, routing.weights_NK)


@settings(max_examples=80)
@given(models_and_removals())
def test_any_set_of_experts_can_be_removed(drawn):
    """None of them gets a weight; the rest share as the model's own rule does over the remaining experts alone."""
    model, removals = drawn
    before, moe = fingerprint(model), model.config.moe
    with intervene(model, remove=removals):
        out = model(tokens(rows=2)[0])
    assert fingerprint(model) == before and out.logits_BTV.isfinite().all()
    for layer, routing in enumerate(out.routings):
        gone = removals.get(layer, [])
        kept = [e for e in range(moe.num_experts) if e not in gone]
        weights_NE = weights_by_expert(routing)
        kept_NK = True if routing.kept_NK is None else routing.kept_NK
        assert not (torch.isin(routing.expert_ids_NK, torch.tensor(gone, dtype=torch.long)) & kept_NK).any()
        assert (weights_NE[:, gone] == 0).all() and (routing.probabilities_NE[:, gone] == 0).all()
        remaining_NE = routing.logits_NE[:, kept]
        assert remaining_NE.isfinite().all() and (routing.logits_NE[:, gone] == -torch.inf).all()
        if moe.router is None or moe.router.kind not in ("relu", "expert_choice"):  # whose numbers depend on E
            state = {
                name: tensor[kept] if name == "selection_bias_E" else tensor
                for name, tensor in model.blocks[layer].ffn.rule_state.named_buffers()
            }
            few = (
                route(remaining_NE, moe.top_k, moe.renormalize)
                if moe.router is None
                else moe.router.route(remaining_NE, moe.top_k, moe.renormalize, state=state)
            )
            assert (weights_NE[:, kept] - weights_by_expert(few)).abs().max() <= 1e-12
        if moe.renormalize:
            wanted_N = 1.0 if routing.kept_NK is None else routing.kept_NK.any(-1).double()  # 0: a token without expert
            assert (weights_NE.sum(-1) - wanted_N).abs().max() <= 1e-12


@settings(max_examples=40)
@given(models_and_removals(), st.data())
def test_a_set_that_leaves_fewer_than_k_is_refused(drawn, data):
    model, _ = drawn
    moe, layer = model.config.moe, data.draw(st.integers(0, 1))
    more = data.draw(st.integers(moe.num_experts - moe.top_k + 1, moe.num_experts))
    gone = data.draw(st.permutations(range(moe.num_experts)))[:more]
    remain = moe.num_experts - more
    message = (
        f"of the {moe.num_experts} experts of layer {layer} only {remain} would remain, but each token needs "
        f"top_k={moe.top_k}; leave more of them in or choose top_k={max(remain, 1)}"
    )
    before = fingerprint(model)
    with pytest.raises(ValueError, match=message), intervene(model, remove={layer: gone}):
        pass
    assert fingerprint(model) == before


# ------------------------------------------------------------------------------------------------ transformers

HF = dict(
    vocab_size=50, hidden_size=16, intermediate_size=16, moe_intermediate_size=8, num_hidden_layers=2, head_dim=8,
    num_attention_heads=2, num_key_value_heads=2, num_experts_per_tok=2, max_position_embeddings=32, pad_token_id=0,
)  # fmt: skip
FAMILIES = {
    "Mixtral": dict(num_local_experts=6),
    "Qwen3Moe": dict(num_experts=6, norm_topk_prob=False),
    "Olmoe": dict(num_experts=6),
    "GraniteMoe": dict(num_local_experts=6),
    "GptOss": dict(num_local_experts=6),
    "DeepseekV3": dict(
        n_routed_experts=6, head_dim=4, n_group=3, topk_group=2, first_k_dense_replace=1, num_hidden_layers=3,
        q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8, n_shared_experts=1,
    ),
}  # fmt: skip


def hf_model(family):
    import transformers

    config = getattr(transformers, f"{family}Config")(**HF | FAMILIES[family])
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "router" in name or "gate.weight" in name or "correction_bias" in name:
                tensor.normal_(generator=torch.Generator().manual_seed(1))
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers(family):
    """The same on each router class, seen by a recording that was entered before the intervention."""
    model, (tokens_BT, targets_BT) = hf_model(family), tokens()
    layer = model.config.num_hidden_layers - 1
    before = hashlib.sha256(b"".join(t.numpy().tobytes() for t in model.state_dict().values())).hexdigest()
    expected = model(tokens_BT).logits

    def used(**changes):
        with record_routing(model) as trace, intervene(model, **changes):
            logits = model(tokens_BT).logits
        return [set(ids.flatten().tolist()) for ids in trace.expert_ids], trace, logits

    everybody, plain, logits = used()
    assert torch.equal(logits, expected)
    assert torch.equal(used(temperature=1.0, top_k=2, remove=[])[2], expected)
    assert 3 in everybody[-1], "or there would be nothing to remove"

    ids, trace, logits = used(remove={layer: [3]})
    assert ids[:-1] == everybody[:-1] and ids[-1] == everybody[-1] - {3} | (ids[-1] - everybody[-1])
    without_3 = ~(plain.expert_ids[-1] == 3).any(-1)
    if family != "DeepseekV3":  # where a group without its expert may lose its place
        assert torch.equal(trace.expert_ids[-1][without_3], plain.expert_ids[-1][without_3])
    assert not torch.allclose(logits, expected)
    wide, _, _ = used(remove=[3, 5], top_k=3)
    assert not any(ids & {3, 5} for ids in wide)
    _, warm, _ = used(temperature=4.0)
    assert torch.allclose(warm.logits[0], plain.logits[0] / 4, atol=1e-5)
    assert used(top_k=1)[1].expert_ids.shape[-1] == 1

    losses_BT = token_losses(model, tokens_BT, targets_BT)
    labels_BT = torch.cat([tokens_BT[:, :1], targets_BT], 1)[:, 1:]
    assert float(losses_BT.mean()) == pytest.approx(
        F.cross_entropy(expected.flatten(0, 1), labels_BT.flatten()).item(), rel=1e-5
    )
    table = knockout(model, {"a": tokens(1), "b": tokens(2)})
    with intervene(model, remove={layer: [3]}):
        without = domain_losses(model, {"b": tokens(2)})["b"]
    assert float(table.deltas_LEC[-1, 3, 1]) == pytest.approx(without - float(table.base_loss_C[1]), abs=1e-6)

    assert torch.equal(model(tokens_BT).logits, expected)
    assert hashlib.sha256(b"".join(t.numpy().tobytes() for t in model.state_dict().values())).hexdigest() == before


def test_transformers_mixtral_without_an_expert():
    """Removing an expert equals the model whose router and experts never had it."""
    import transformers

    model, tokens_BT = hf_model("Mixtral"), tokens()[0]
    smaller = transformers.MixtralForCausalLM(transformers.MixtralConfig(**HF | dict(num_local_experts=5))).eval()
    kept = [0, 1, 2, 4, 5]
    weights = model.state_dict()
    smaller.load_state_dict(
        {name: tensor[kept] if ".mlp." in name and tensor.shape[0] == 6 else tensor for name, tensor in weights.items()}
    )
    with intervene(model, remove=[3]):
        assert torch.allclose(model(tokens_BT).logits, smaller(tokens_BT).logits, atol=1e-6)


@pytest.fixture(scope="module")
def mixtral():
    return hf_model("Mixtral")


@settings(max_examples=30)
@given(st.sets(st.integers(0, 5), max_size=4), st.sets(st.integers(0, 5), max_size=4))
def test_transformers_any_set_of_experts_can_be_removed(mixtral, first, second):
    """None of them gets a weight; the rest are Mixtral's: softmax over what remains, the two best, renormalised."""
    with record_routing(mixtral) as trace, intervene(mixtral, remove={0: sorted(first), 1: sorted(second)}):
        mixtral(tokens(rows=2)[0])
    for layer, gone in enumerate((first, second)):
        kept = torch.tensor([e for e in range(6) if e not in gone])
        few = route(trace.logits[layer][:, kept], 2)
        assert torch.equal(trace.expert_ids[layer], kept[few.expert_ids_NK])
        assert torch.allclose(trace.weights[layer], few.weights_NK, atol=1e-6)


def test_groups_that_are_left_with_too_few():
    """DeepSeek-V3 chooses among the best groups only: all but one expert of each gone is too much for some token."""
    model = hf_model("DeepseekV3")
    with intervene(model, remove=[0, 2]):
        model(tokens()[0])
    model.config.topk_group = 1
    for module in model.modules():
        if hasattr(module, "topk_group"):
            module.topk_group = 1
    with pytest.raises(ValueError, match="in layer 1 a token's best groups of experts hold fewer than top_k=2"):
        with intervene(model, remove=[0, 2, 4]):
            model(tokens()[0])


# ------------------------------------------------------------------------------------------- what cannot be asked


@pytest.mark.parametrize("wrong", [1.0, 0.5, True, "1", None, torch.tensor(1.0)])
def test_an_expert_is_named_by_a_whole_number(wrong):
    model = new_model()
    with pytest.raises(ValueError, match=r"remove of layer 0: expert=.* is not a whole number"):
        with intervene(model, remove=[wrong]):
            pass
    with intervene(model, remove=torch.tensor([1, 2]), top_k=np.int64(3)):
        assert not set(ids(model, tokens()[0])[0].flatten().tolist()) & {1, 2}
    with pytest.raises(ValueError, match=r"top_k=2\.0 is not a whole number"), intervene(model, top_k=2.0):
        pass


def test_losses_need_targets_of_the_same_shape_and_ids_of_the_vocabulary():
    model, (tokens_BT, targets_BT) = new_model(), tokens()
    for bad in ((tokens_BT, targets_BT[:2]), (tokens_BT[:0], targets_BT[:0]), (tokens_BT[0], targets_BT[0])):
        with pytest.raises(ValueError, match="tokens have shape"):
            token_losses(model, *bad)
        with pytest.raises(ValueError, match="tokens have shape"):
            domain_losses(model, {"a": bad})
    for id_ in (50, -1):
        with pytest.raises(ValueError, match=rf"tokens have the id {id_}, but the model's ids are 0\.\.49"):
            token_losses(model, tokens_BT.clone().fill_(id_), targets_BT)
    with pytest.raises(ValueError, match="targets have the id 50"):
        token_losses(model, tokens_BT, targets_BT.clone().fill_(50))


def test_a_knockout_needs_targets():
    model, windows = new_model(), tokens()
    with pytest.raises(ValueError, match="domain 'b' has no target"):
        knockout(model, {"a": windows, "b": (windows[0], torch.full_like(windows[1], -100))})
