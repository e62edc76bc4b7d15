"""DecoderLM against transformers' models with the same weights, its cache against no cache, its edges."""

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from real_models import TINY_LLAMA, difference, stories

from upcycling.core.balance import aux_loss
from upcycling.core.config import ModelConfig, MoEConfig
from upcycling.core.model import DecoderLM, FeedForward

SIZES = dict(vocab_size=29, d_model=16, n_layers=2, n_heads=4, d_ff=24, seq_len=16)
FAMILIES = dict(simple=ModelConfig.simple, smol=ModelConfig.smol, nano=ModelConfig.nano)
MOE = MoEConfig(num_experts=4, top_k=2, router_std=1.0)
VARIANTS = {
    "simple": ModelConfig.simple(**SIZES),
    "no positions": ModelConfig.simple(**SIZES, position="none"),
    "smol": ModelConfig.smol(**SIZES),
    "smol, 2 kv heads": ModelConfig.smol(**SIZES, n_kv_heads=2),
    "smol, 1 kv head": ModelConfig.smol(**SIZES, n_kv_heads=1),
    "nano": ModelConfig.nano(**SIZES),
    "simple moe": ModelConfig.simple(**SIZES, moe=MOE),
    "smol moe, 2 kv heads": ModelConfig.smol(**SIZES, n_kv_heads=2, moe=replace(MOE, layers=(1,))),
    "nano moe": ModelConfig.nano(**SIZES, moe=replace(MOE, noisy=True)),
}
each_variant = pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())


def make_model(config, std=None, seed=0):
    """A model in evaluation mode; with `std`, every parameter (norms and biases too) is moved by N(0, std)."""
    torch.manual_seed(seed)
    model = DecoderLM(config)
    if std is not None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=std)
    return model.eval()


def some_tokens(batch=3, length=16, vocab=29):
    return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(1))


# ----------------------------------------------------------------------------------------- the same as in transformers


def gpt2_weights(model):
    """DecoderLM (simple) -> names and layouts of GPT2LMHeadModel, whose linear maps are stored transposed."""
    own = model.state_dict()
    weights = {"wte.weight": own["token_embedding.weight"], "wpe.weight": own["position_embedding.weight"]}
    weights |= {f"ln_f.{kind}": own[f"norm.{kind}"] for kind in ("weight", "bias")}
    for i, kind in product(range(model.config.n_layers), ("weight", "bias")):
        block = {name: own[f"blocks.{i}.{name}.{kind}"] for name in (
            "attention_norm", "attention.q", "attention.k", "attention.v", "attention.out", "ffn_norm", "ffn.up",
            "ffn.down",
        )}  # fmt: skip
        qkv = torch.cat([block["attention.q"], block["attention.k"], block["attention.v"]])
        weights[f"h.{i}.ln_1.{kind}"] = block["attention_norm"]
        weights[f"h.{i}.ln_2.{kind}"] = block["ffn_norm"]
        for name, value in (
            ("attn.c_attn", qkv), ("attn.c_proj", block["attention.out"]), ("mlp.c_fc", block["ffn.up"]),
            ("mlp.c_proj", block["ffn.down"]),
        ):  # fmt: skip
            weights[f"h.{i}.{name}.{kind}"] = value.t() if kind == "weight" else value
    return {f"transformer.{name}": value for name, value in weights.items()} | {"lm_head.weight": own["head.weight"]}


def llama_weights(model):
    """DecoderLM (smol, dense or MoE) -> names of LlamaForCausalLM or MixtralForCausalLM."""
    own = model.state_dict()
    weights = {
        "model.embed_tokens.weight": own["token_embedding.weight"],
        "model.norm.weight": own["norm.weight"],
        "lm_head.weight": own["head.weight"],
    }
    for i in range(model.config.n_layers):
        pairs = [
            ("input_layernorm", "attention_norm"), ("post_attention_layernorm", "ffn_norm"),
            ("self_attn.q_proj", "attention.q"), ("self_attn.k_proj", "attention.k"),
            ("self_attn.v_proj", "attention.v"), ("self_attn.o_proj", "attention.out"),
        ]  # fmt: skip
        if model.config.moe is None:
            pairs += [("mlp.up_proj", "ffn.up"), ("mlp.gate_proj", "ffn.gate"), ("mlp.down_proj", "ffn.down")]
        else:
            pairs += [("mlp.gate", "ffn.router")]
            experts = model.blocks[i].ffn.experts
            weights[f"model.layers.{i}.mlp.experts.gate_up_proj"] = torch.cat(
                [experts.w_gate_EFD, experts.w_up_EFD], dim=1
            )
            weights[f"model.layers.{i}.mlp.experts.down_proj"] = experts.w_down_EDF
        weights |= {f"model.layers.{i}.{theirs}.weight": own[f"blocks.{i}.{ours}.weight"] for theirs, ours in pairs}
    return {name: value.detach() for name, value in weights.items()}


def assert_same_function(model, theirs, weights):
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert not unexpected
    assert not [name for name in missing if not name.endswith((".attn.bias", ".attn.masked_bias", "inv_freq"))]
    tokens_BT = some_tokens()
    with torch.no_grad():
        out, expected = model(tokens_BT, tokens_BT.roll(-1, 1)), theirs.eval()(tokens_BT).logits
    assert expected.abs().max() > 1, "the comparison needs logits that differ"
    assert (out.logits_BTV - expected).abs().max() < 1e-5 * expected.abs().max()
    loss = torch.nn.functional.cross_entropy(expected.flatten(0, 1), tokens_BT.roll(-1, 1).flatten())
    assert out.loss.item() == pytest.approx(loss.item(), abs=1e-5)


def test_simple_is_gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=29, n_embd=16, n_layer=2, n_head=4, n_inner=24, n_positions=16, activation_function="gelu",
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = make_model(ModelConfig.simple(**SIZES), std=0.2)
    assert_same_function(model, GPT2LMHeadModel(config), gpt2_weights(model))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_smol_is_llama(tied, kv_heads):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=29, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=kv_heads, max_position_embeddings=16, rms_norm_eps=1e-3, tie_word_embeddings=tied,
        rope_parameters=dict(rope_type="default", rope_theta=100.0),
    )  # fmt: skip
    ours = ModelConfig.smol(**SIZES, n_kv_heads=kv_heads, tie_embeddings=tied, rope_theta=100.0, norm_eps=1e-3)
    model = make_model(ours, std=0.2)
    assert_same_function(model, LlamaForCausalLM(config), llama_weights(model))


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_smol_moe_is_mixtral(top_k):
    from transformers import MixtralConfig, MixtralForCausalLM
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    config = MixtralConfig(
        vocab_size=29, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=16, rms_norm_eps=1e-5, tie_word_embeddings=False,
        num_local_experts=4, num_experts_per_tok=top_k, rope_parameters=dict(rope_type="default", rope_theta=100.0),
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    moe = MoEConfig(num_experts=4, top_k=top_k, router_std=1.0)
    model = make_model(
        ModelConfig.smol(**SIZES, n_kv_heads=2, tie_embeddings=False, rope_theta=100.0, moe=moe), std=0.2
    )
    assert_same_function(model, MixtralForCausalLM(config), llama_weights(model))
    for routing in model(some_tokens()).routings:  # theirs is k where ours is 1
        theirs = load_balancing_loss_func((routing.logits_NE,), 4, top_k)
        assert theirs.item() == pytest.approx(top_k * aux_loss(routing).item(), rel=1e-5)


def test_a_pretrained_llama_keeps_its_logits_and_its_loss():
    """Every weight of a real Llama in our class, by hand: its logits, and its loss on the stories that it knows."""
    from transformers import LlamaForCausalLM

    theirs = LlamaForCausalLM.from_pretrained(TINY_LLAMA).eval()
    sizes = dict(vocab_size=512, d_model=64, n_layers=4, n_heads=8, n_kv_heads=4, d_ff=160, seq_len=256)
    ours, pretrained = DecoderLM(ModelConfig.smol(**sizes)).eval(), theirs.state_dict()
    assert ours.num_parameters() == 205_376
    with torch.no_grad():
        for name, value in llama_weights(ours).items():  # these share their memory with the model's parameters
            value.copy_(pretrained[name])
        windows = story_windows()
        expected = theirs(windows[:2, :-1]).logits
        assert expected.abs().max() > 5 and difference(expected, ours(windows[:2, :-1]).logits_BTV) <= 1e-5
        assert ours(windows[:, :-1], windows[:, 1:]).loss.item() == pytest.approx(2.23, abs=0.15)


def story_windows(length=256):
    from upcycling.text.tokenizer import encode_documents, load_tokenizer

    ids = [i for document in encode_documents(load_tokenizer(TINY_LLAMA), stories()) for i in document]
    rows = len(ids) // (length + 1)
    return torch.tensor(ids[: rows * (length + 1)]).view(rows, length + 1)


# --------------------------------------------------------------------------------------------------------------- losses


def test_the_loss_is_the_mean_over_real_targets():
    model = make_model(ModelConfig.simple(**SIZES), std=0.3)
    tokens_BT, targets_BT = some_tokens(), some_tokens().roll(-1, 1)
    targets_BT[0, 3:] = -100
    targets_BT[2] = -100
    out = model(tokens_BT, targets_BT)
    log_p_BTV = out.logits_BTV.log_softmax(-1)
    losses = [-log_p_BTV[0, t, targets_BT[0, t]] for t in range(3)]
    losses += [-log_p_BTV[1, t, targets_BT[1, t]] for t in range(16)]
    assert out.loss.item() == pytest.approx(sum(losses).item() / 19, abs=1e-6)
    other = tokens_BT.clone()
    other[2] = (other[2] + 1) % 29  # what has no target cannot change the loss
    assert model(other, targets_BT).loss.item() == pytest.approx(out.loss.item(), abs=1e-6)
    assert model(tokens_BT).loss is None


def test_a_new_model_knows_nothing():
    for config in VARIANTS.values():
        tokens_BT = some_tokens(batch=8)
        assert make_model(config)(tokens_BT, tokens_BT.roll(-1, 1)).loss.item() == pytest.approx(math.log(29), abs=0.15)


# ---------------------------------------------------------------------------------------------------------------- cache


@each_variant
@pytest.mark.parametrize("chunks", [[1] * 16, [16], [5, 1, 7, 1, 1, 1], [1, 15]])
def test_the_cache_changes_nothing(config, chunks):
    model, tokens_BT = make_model(config, std=0.2).double(), some_tokens()
    with torch.no_grad():
        expected = model(tokens_BT).logits_BTV
        cache = model.new_cache(3)
        parts = [model(part, cache=cache).logits_BTV for part in tokens_BT.split(chunks, dim=1)]
    assert cache.length == 16
    assert (torch.cat(parts, dim=1) - expected).abs().max() < 1e-6  # rotary tables are float32


def test_the_cache_has_an_end():
    model, tokens_BT = make_model(ModelConfig.smol(**SIZES)), some_tokens()
    cache = model.new_cache(3)
    model(tokens_BT[:, :10], cache=cache)
    with pytest.raises(ValueError, match="the sequence has 17 tokens but the model's context is 16"):
        model(tokens_BT[:, :7], cache=cache)
    assert cache.length == 10


def test_the_cache_holds_only_the_kv_heads():
    model = make_model(ModelConfig.smol(**SIZES, n_kv_heads=2)).bfloat16()
    cache = model.new_cache(5)
    assert cache.keys.shape == cache.values.shape == (2, 5, 2, 16, 4)
    assert cache.keys.dtype == torch.bfloat16


# ----------------------------------------------------------------------------------------------------------- training


@each_variant
def test_gradient_checkpointing_changes_nothing(config):
    config = replace(config, dropout=0.1)  # dropout and noise must be drawn alike when a block is computed again
    model, tokens_BT = make_model(config, std=0.1).train(), some_tokens()
    gradients, calls = [], []
    model.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    for checkpointing, forwards in ((False, 1), (True, 2)):
        model.gradient_checkpointing = checkpointing
        calls.clear()
        model.zero_grad(set_to_none=True)
        torch.manual_seed(0)
        model.objective(model(tokens_BT, tokens_BT.roll(-1, 1))).backward()
        assert len(calls) == forwards, "checkpointing computes each block twice"
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-6, atol=1e-8, msg=name)


@each_variant
def test_every_parameter_learns(config):
    model, tokens_BT = make_model(config, std=0.1).train(), some_tokens(batch=16)
    model.objective(model(tokens_BT, tokens_BT.roll(-1, 1))).backward()
    for name, parameter in model.named_parameters():
        if not name.endswith("attention.k.bias"):  # softmax does not see what all keys share
            assert parameter.grad.abs().max() > 1e-7, name


def test_dropout_is_for_training_only():
    model, tokens_BT = make_model(ModelConfig.simple(**SIZES, dropout=0.5)), some_tokens()
    assert torch.equal(model(tokens_BT).logits_BTV, model(tokens_BT).logits_BTV)
    model.train()
    assert not torch.equal(model(tokens_BT).logits_BTV, model(tokens_BT).logits_BTV)


@each_variant
def test_other_precisions(config):
    model, tokens_BT = make_model(config, std=0.05), some_tokens()
    expected = model(tokens_BT, tokens_BT)
    scale = expected.logits_BTV.abs().max()
    double = make_model(config, std=0.05).double()(tokens_BT, tokens_BT)
    assert double.logits_BTV.dtype == double.loss.dtype == torch.float64
    assert (double.logits_BTV - expected.logits_BTV).abs().max() < 1e-5 * scale.clamp(min=1)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(tokens_BT, tokens_BT)
    half = make_model(config, std=0.05).bfloat16()(tokens_BT, tokens_BT)
    for out in (mixed, half):
        assert out.logits_BTV.dtype == torch.bfloat16
        assert out.loss.dtype == torch.float32
        far = ((out.logits_BTV - expected.logits_BTV).abs() > 0.08 * scale).any(-1).float().mean()
        assert far < (0.15 if config.moe else 0.01)  # near a tie, a token may go to another expert
        model.objective(out).backward()
    assert all(p.grad.dtype == torch.float32 for name, p in model.named_parameters() if "noise" not in name)


# ---------------------------------------------------------------------------------------------------------------- edges


def test_input_that_does_not_fit():
    model = make_model(ModelConfig.simple(**SIZES))
    with pytest.raises(ValueError, match=r"the sequence has 17 tokens but the model's context is 16; shorten it"):
        model(torch.zeros(1, 17, dtype=torch.long))
    for bad in (29, -1):
        tokens_BT = some_tokens()
        tokens_BT[1, 2] = bad
        with pytest.raises(ValueError, match=f"token id {bad} is outside the vocabulary of 29; was the text tokenized"):
            model(tokens_BT)


def test_empty_sequences_give_empty_logits():
    for config in (VARIANTS["simple"], VARIANTS["simple moe"], VARIANTS["smol, 2 kv heads"]):
        assert make_model(config)(torch.zeros(2, 0, dtype=torch.long)).logits_BTV.shape == (2, 0, 29)


def test_initialisation():
    sizes = dict(vocab_size=300, d_model=128, n_layers=8, n_heads=4, d_ff=128, seq_len=100)
    for family, moe in product(
        FAMILIES.values(), (None, MoEConfig(4, 2, router_std=0.5, router_bias=True, noisy=True))
    ):
        model = make_model(family(**sizes, init_std=0.03, moe=moe))
        for name, parameter in model.named_parameters():
            if "norm" in name:
                expected = 1.0 if name.endswith("weight") else 0.0
                assert (parameter == expected).all(), name
            elif name.endswith("bias") or ".b_" in name:
                assert (parameter == 0).all(), name
            else:
                std = 0.03
                if "router" in name or "noise" in name:
                    std = 0.5
                elif "out." in name or "down" in name:
                    std = 0.03 / 4  # 1 / sqrt(2 * 8 layers)
                assert parameter.std().item() == pytest.approx(std, rel=0.12), name
                assert abs(parameter.mean().item()) < 0.12 * std, name


def test_a_zero_router_starts_at_zero():
    model = make_model(ModelConfig.simple(**SIZES, moe=replace(MOE, router_std=0.0, noisy=True)))
    assert all((block.ffn.router.weight == 0).all() for block in model.blocks)


@each_variant
def test_state_dict_round_trip(config):
    model, other = make_model(config, std=0.1), make_model(config, seed=1)
    assert not torch.equal(model(some_tokens()).logits_BTV, other(some_tokens()).logits_BTV)
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(some_tokens()).logits_BTV, other(some_tokens()).logits_BTV)
    assert (other.head.weight is other.token_embedding.weight) == config.tie_embeddings


def test_which_layers_are_what():
    model = make_model(ModelConfig.simple(**SIZES, moe=replace(MOE, layers=(1,))))
    assert isinstance(model.blocks[0].ffn, FeedForward)
    assert len(model(some_tokens()).routings) == 1
    assert make_model(ModelConfig.simple(**SIZES))(some_tokens()).routings == []
