"""Accounting: every number against what a run executes, holds or keeps."""

import json
from dataclasses import replace

import pytest
import torch
from tiny_transformers import MOE_FAMILIES, make_config, make_dense, moe_model
from torch.profiler import ProfilerActivity, profile

from upcycling.core import model as model_module
from upcycling.core.config import ModelConfig, MoEConfig
from upcycling.core.model import DecoderLM
from upcycling.cost.account import account, flop_counter, side_by_side
from upcycling.cost.activations import activation_bytes
from upcycling.cost.parts import count_parameters, forward_flops
from upcycling.cost.references import REFERENCE, published_claims
from upcycling.kernels import choice
from upcycling.kernels.expert_by_expert import MANY

transformers = pytest.importorskip("transformers")

B, T = 2, 12
SIZES = dict(vocab_size=60, d_model=16, n_layers=3, n_heads=4, d_ff=24, seq_len=16)
MOE = MoEConfig(num_experts=4, top_k=2)
CONFIGS = {
    "gelu tied": ModelConfig.simple(**SIZES),
    "swiglu grouped queries untied": ModelConfig.smol(**SIZES, n_kv_heads=2, tie_embeddings=False),
    "relu untied with biases": ModelConfig.nano(**SIZES),
    "moe gelu": ModelConfig.simple(**SIZES, moe=replace(MOE, router_bias=True)),
    "moe swiglu grouped queries": ModelConfig.smol(**SIZES, n_kv_heads=1, moe=replace(MOE, num_experts=8, top_k=1)),
    "moe in one layer, shared expert": ModelConfig.smol(**SIZES, moe=replace(MOE, layers=(1,), shared_experts=1)),
    "moe noisy, narrow experts": ModelConfig.simple(**SIZES, moe=replace(MOE, noisy=True, expert_d_ff=8)),
    "moe wide": ModelConfig.smol(**SIZES | dict(d_model=256, d_ff=256, n_layers=1), moe=MOE),
}


def executed(run) -> int:
    with flop_counter() as counter:
        run()
    return counter.get_total_flops()


def on_meta(make):
    with torch.device("meta"):
        return make()


# --------------------------------------------------------------------------------------------------------------- FLOPs


@pytest.fixture(autouse=True)
def plain_experts(monkeypatch):
    """A kernel computes and keeps a few rows more, and a counter sees them: here as the definition has it."""
    monkeypatch.setitem(choice._taken, MANY.name, False)


@pytest.mark.parametrize("name", CONFIGS)
def test_flops_are_those_that_a_decoder_lm_executes(name):
    config = CONFIGS[name]
    model = DecoderLM(config)  # in training mode, in which a noisy router computes its noise
    tokens_BT = torch.randint(60, (B, T))
    found = account(model, B, T - 1, context=T, activations=False)
    forward = executed(lambda: model(tokens_BT[:, :-1]))
    assert found.forward == forward == B * forward_flops(config, T - 1)
    update = executed(lambda: model.objective(model(tokens_BT[:, :-1], tokens_BT[:, 1:])).backward())
    assert (found.update, found.backward) == (update, update - forward)
    assert found.prefill == forward - found.head * (T - 2) / (T - 1), "the head sees the last token only"
    cache = model.new_cache(B)
    with torch.no_grad():
        model(tokens_BT[:, :-1], cache=cache)
        assert found.decode == executed(lambda: model(tokens_BT[:, -1:], cache=cache))
    assert found == account(config, B, T - 1, context=T, activations=False), "the same without the model"


def check_transformers(model, vocab):
    tokens_BT = torch.randint(vocab, (B, T))
    found = account(model, B, T - 1, context=T, activations=False)
    prompt_BT = tokens_BT[:, :-1]
    assert found.forward == executed(lambda: model(prompt_BT, use_cache=False))
    assert found.update == executed(lambda: model(prompt_BT, labels=prompt_BT, use_cache=False).loss.backward())
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        assert found.prefill == executed(lambda: model(prompt_BT, past_key_values=cache, logits_to_keep=1))
        assert found.decode == executed(lambda: model(tokens_BT[:, -1:], past_key_values=cache))
    kept = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    for layer in cache.layers:  # a cache with a window keeps what the next token will see, one less than the window
        if getattr(layer, "sliding_window", None):
            kept += [layer.keys[:, :, :1], layer.values[:, :, :1]]
    assert found.kv_cache == sum(tensor.numel() * tensor.element_size() for tensor in kept)
    parameters = dict(model.named_parameters())
    experts = sum(p.numel() for name, p in parameters.items() if ".experts." in name)
    assert (found.total, found.experts) == (sum(p.numel() for p in parameters.values()), experts)
    return found


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_flops_are_those_that_a_transformers_moe_executes(family):
    model = moe_model(family).train()
    found = check_transformers(model, vocab=40)
    assert found.active == found.total - found.experts * 5 // 8, "3 of 8 experts are used"
    assert 0 < found.router < found.experts


@pytest.mark.parametrize(
    ("kind", "variant"),
    [("llama", 0), ("llama", 1), ("mistral", 0), ("qwen2", 1), ("gemma4_text", 0), ("phi3", 2), ("cohere2", 0)],
)  # plain; tied with its own head width; windows, in all and in some layers; unequal layers; fused matrices
def test_flops_are_those_that_a_dense_transformers_model_executes(kind, variant):
    found = check_transformers(make_dense(kind, variant).train(), vocab=97)
    assert found.active == found.total
    assert found.experts == found.router == 0


def gpt2():
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=60, n_embd=16, n_layer=3, n_head=4, n_positions=16)
    )


def test_gpt2_is_our_simple_model():
    found, ours = check_transformers(gpt2().train(), vocab=60), account(CONFIGS["gelu tied"], B, T - 1, context=T)
    wide = account(replace(CONFIGS["gelu tied"], d_ff=64), B, T - 1, context=T)
    assert replace(found, name="", activations=0) == replace(wide, name="", activations=0)
    assert ours.forward < wide.forward


# ---------------------------------------------------------------------------------------------------------- parameters


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_and_bytes_are_those_of_the_built_model(name):
    config, model = CONFIGS[name], DecoderLM(CONFIGS[name])
    found, sizes = account(config, B, T, activations=False), {n: p.numel() for n, p in model.named_parameters()}
    assert found.total == sum(sizes.values())
    assert found.active == count_parameters(config).active
    assert found.experts == sum(size for name, size in sizes.items() if ".experts." in name)
    assert found.router == sum(size for name, size in sizes.items() if ".router." in name or ".noise." in name)
    assert found.embeddings == sum(size for name, size in sizes.items() if "embedding" in name)
    optimizer = torch.optim.AdamW(model.parameters())
    tokens_BT = torch.randint(60, (B, T))
    model.objective(model(tokens_BT, tokens_BT)).backward()
    optimizer.step()
    state = [t for of in optimizer.state.values() for name, t in of.items() if name != "step"]
    assert found.weights == sum(p.nbytes for p in model.parameters())
    assert found.gradients == sum(p.grad.nbytes for p in model.parameters())
    assert found.optimizer == sum(t.nbytes for t in state)
    cache = model.new_cache(B)
    assert account(config, B, context=config.seq_len).kv_cache == cache.keys.nbytes + cache.values.nbytes


def test_published_sizes_of_models_that_nothing_here_could_hold():
    mixtral = on_meta(lambda: transformers.MixtralForCausalLM(transformers.MixtralConfig()))
    found = account(mixtral, 1, 2048, context=4096)
    assert (found.total, found.active) == (46_702_792_704, 12_879_925_248)
    assert found.activations is None and "not measured" in str(found) and found.training_intensity is None
    llama = on_meta(lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig()))
    assert account(llama, 1, 128).total == 6_738_415_616
    assert account(gpt2(), 1, 8).total == sum(p.numel() for p in gpt2().parameters())


# -------------------------------------------------------------------------------------------------------------- memory


def allocated(run) -> int:
    """Bytes that `run` leaves allocated in what it returns, as torch's profiler sees them."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        kept = run()
    total = sum(event.self_cpu_memory_usage for event in profiled.key_averages())
    del kept
    return total


@pytest.mark.parametrize("name", ["gelu tied", "swiglu grouped queries untied", "moe gelu", "moe wide"])
def test_activations_are_what_stays_allocated_until_the_backward_pass(name):
    model, tokens_BT = DecoderLM(CONFIGS[name]), torch.randint(60, (B, T))
    with flop_counter():  # without it experts of this width keep a few rows more, see upcycling.experts._blocks
        held = allocated(lambda: model.objective(model(tokens_BT, tokens_BT)))
    assert activation_bytes(model, B, T) == pytest.approx(held, abs=100), "the loss itself is a few bytes"
    assert held <= allocated(lambda: model.objective(model(tokens_BT, tokens_BT))) <= 1.1 * held


def test_activations_of_transformers_models():
    model, tokens_BT = make_dense("llama").train(), torch.randint(97, (B, T))
    held = allocated(lambda: model(tokens_BT, labels=tokens_BT, use_cache=False).loss)
    assert activation_bytes(model, B, T) == pytest.approx(held, rel=0.02)


@pytest.mark.parametrize("name", CONFIGS)
def test_activations_of_a_configuration_are_those_of_the_built_model(name):
    config = CONFIGS[name]
    measured = account(DecoderLM(config), 3, T).activations
    assert account(config, 3, T).activations == measured
    assert account(on_meta(lambda: DecoderLM(config)), 3, T).activations == measured


def test_activations_where_the_loss_never_holds_all_logits(monkeypatch):
    config = CONFIGS["moe gelu"]
    whole = account(config, 3, T).activations
    monkeypatch.setattr(model_module, "MANY_LOGITS", 2 * T * config.vocab_size)  # less than three sequences have
    in_chunks = account(config, 3, T).activations
    assert account(DecoderLM(config), 3, T).activations == in_chunks < whole


def test_measuring_leaves_no_trace():
    model = DecoderLM(replace(CONFIGS["moe gelu"], dropout=0.1)).eval()
    before = torch.random.get_rng_state()
    activation_bytes(model, B, T)
    account(model.config, B, T)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not model.training and all(p.grad is None for p in model.parameters())


def test_bytes_follow_the_dtype():
    config = CONFIGS["moe gelu"]
    whole, half = account(config, B, T), account(config, B, T, dtype=torch.bfloat16)
    assert (half.weights, half.kv_cache) == (whole.weights / 2, whole.kv_cache / 2)
    assert 0.5 * whole.activations < half.activations < 0.8 * whole.activations, "losses stay in float32"
    assert account(DecoderLM(config).bfloat16(), B, T) == half


# ----------------------------------------------------------------------------------------------------------- intensity


def test_intensity_is_flops_over_the_bytes_that_must_travel():
    config = ModelConfig.smol(vocab_size=60, d_model=16, n_layers=1, n_heads=4, d_ff=24, seq_len=16)
    a = account(config, 1, 8, context=16)
    weights, cache = 4 * count_parameters(config).total, 2 * 16 * 4  # a token's keys and values
    assert a.decode_intensity == a.decode / (weights + 16 * cache)
    assert a.prefill_intensity == a.prefill / (weights + 8 * cache)
    # forward and backward read; AdamW: weights, gradients and two moments; activations: written, read
    assert a.training_intensity == a.update / (2 * weights + 2 * 4 * weights + 2 * a.activations)


def test_few_tokens_read_few_experts():
    config = CONFIGS["moe gelu"]
    expert = 4 * 3 * count_parameters(config).expert  # bytes, in three layers
    read = [account(config, batch, 1, activations=False).read_by_decode for batch in (1, 2, 100)]
    rest = 4 * (account(config).total - 16 * 16) - 4 * expert  # the position table is no matrix of a product
    assert read == [rest + 2 * expert, rest + 3 * expert, rest + 4 * expert]
    dense = account(CONFIGS["gelu tied"], 1, 1)
    assert dense.read_by_decode == dense.weights - 4 * 16 * 16


# -------------------------------------------------------------------------------------------------- tables and refusals


def test_tables_show_the_numbers_in_text_and_html():
    a = account(REFERENCE["sparse-158m"], 1, 128, activations=False)
    table = side_by_side({"sparse": a, "small": account(CONFIGS["gelu tied"], B, T)})
    for shown in ("158,623,744", "70,543,360", "11.6", "605", "sparse", "small"):
        assert shown in str(table) and shown in table._repr_html_(), shown
    assert "158,623,744" in str(a) and "<table>" in a._repr_html_()
    assert len({len(line) for line in str(table).splitlines()}) == 1


def test_published_claims_recomputed():
    text = str(published_claims())
    for number in ("11.63", "5.05", "70.54M", "44.68M", "18.95M", "2.94x", "5.47x", "2.25x", "55.0M", "134.6M"):
        assert number in text, number
    json.dumps(published_claims())


@pytest.mark.parametrize("kind", ["qwen3_5_text", "lfm2"])
def test_layers_without_attention_are_refused(kind):
    model = on_meta(lambda: transformers.AutoModelForCausalLM.from_config(make_config(kind)))
    with pytest.raises(ValueError, match=f"{kind} has layers of kind .*flop_counter"):
        account(model, B, T)


def test_what_cannot_be_counted():
    model = DecoderLM(CONFIGS["gelu tied"])
    with pytest.raises(ValueError, match="a Linear is not a causal language model"):
        account(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="17 tokens do not fit the model's context of 16"):
        account(model, 1, 8, context=17)
    with pytest.raises(ValueError, match="batch_size=0"):
        account(model, 0)
    model.gradient_checkpointing = True
    with pytest.raises(ValueError, match="gradient checkpointing"):
        account(model)
