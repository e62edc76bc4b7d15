"""DecoderLM to and from transformers' classes: the same logits both ways, and a reason where that is impossible."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from upcycling import DecoderLM, ModelConfig, MoEConfig, from_hf, generate, save_hf, to_hf, train_tokenizer

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
SIZES = dict(vocab_size=61, d_model=32, n_layers=3, n_heads=4, d_ff=48, seq_len=24)
MOE = MoEConfig(num_experts=4, top_k=2, router_std=1.0)
CASES = {
    "smol": ("LlamaForCausalLM", ModelConfig.smol(**SIZES)),
    "smol-gqa": ("LlamaForCausalLM", ModelConfig.smol(**SIZES, n_kv_heads=2, norm_eps=3e-2, rope_theta=100.0)),
    "smol-biases": (
        "LlamaForCausalLM",
        ModelConfig.smol(**SIZES, qkv_bias=True, ffn_bias=True, tie_embeddings=False),
    ),
    "simple": ("GPT2LMHeadModel", ModelConfig.simple(**SIZES, norm_eps=3e-2)),
    "simple-relu": (
        "GPT2LMHeadModel",
        ModelConfig.simple(**SIZES, activation="relu", qkv_bias=False, tie_embeddings=False),
    ),
    "gpt2": ("GPT2LMHeadModel", ModelConfig.simple(**SIZES, activation="gelu_tanh")),
    "mixtral": ("MixtralForCausalLM", ModelConfig.smol(**SIZES, n_kv_heads=2, moe=MOE)),
    "mixtral-k1": ("MixtralForCausalLM", ModelConfig.smol(**SIZES, tie_embeddings=False, moe=replace(MOE, top_k=1))),
    "mixtral-k4": ("MixtralForCausalLM", ModelConfig.smol(**SIZES, norm_eps=3e-2, moe=replace(MOE, top_k=4))),
    "partial": ("Qwen2MoeForCausalLM", ModelConfig.smol(**SIZES, moe=replace(MOE, layers=(1,)))),
    "unnormalised": ("Qwen2MoeForCausalLM", ModelConfig.smol(**SIZES, moe=replace(MOE, renormalize=False))),
    "moe-qkv-bias": ("Qwen2MoeForCausalLM", ModelConfig.smol(**SIZES, n_kv_heads=2, qkv_bias=True, moe=MOE)),
}


@torch.no_grad()
def make(config: ModelConfig, seed: int = 0) -> DecoderLM:
    """A model whose every parameter is random: norms and biases too."""
    torch.manual_seed(seed)
    model = DecoderLM(config)
    for name, parameter in model.named_parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.3 + ("norm" in name and name.endswith("weight")))
    return model.eval()


def tokens(config: ModelConfig, seed: int = 1):
    return torch.randint(config.vocab_size, (2, config.seq_len), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def difference(own: DecoderLM, theirs) -> float:
    """Largest difference of the logits over the largest logit (at least 1)."""
    tokens_BT = tokens(own.config)
    expected_BTV = own(tokens_BT).logits_BTV
    diff = (theirs(tokens_BT).logits - expected_BTV).abs().max()
    return float(diff / max(1.0, expected_BTV.abs().max()))


@pytest.mark.parametrize("name", CASES)
def test_same_logits_there_on_disk_and_back(name, tmp_path):
    from transformers import AutoModelForCausalLM

    class_name, config = CASES[name]
    own = make(config)
    state = torch.random.get_rng_state()
    theirs = to_hf(own)
    assert torch.equal(state, torch.random.get_rng_state())
    assert type(theirs).__name__ == class_name and not theirs.training
    assert difference(own, theirs) <= 1e-5
    for implementation in ("eager", "grouped_mm") if config.moe else ():
        theirs.set_experts_implementation(implementation)
        assert difference(own, theirs) <= 1e-5

    save_hf(own, tmp_path / "model")
    names = {file.name for file in (tmp_path / "model").iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors"}
    reloaded, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(loading.values()), loading
    assert difference(own, reloaded) <= 1e-5

    back, from_disk = from_hf(theirs), from_hf(tmp_path / "model")
    assert difference(back, reloaded) <= 1e-5
    assert difference(from_disk, theirs) <= 1e-5
    assert from_disk.config == back.config
    assert replace(back.config, moe=None) == replace(
        config,
        moe=None,
        n_kv_heads=config.kv_heads if class_name != "GPT2LMHeadModel" else None,
        **{field: getattr(back.config, field) for field in ("qkv_bias", "attention_out_bias", "ffn_bias")},
    )
    if config.moe:
        ours, again = config.moe, back.config.moe
        assert again.aux_weight == pytest.approx(ours.aux_weight)
        assert replace(again, aux_weight=0, router_std=0) == replace(ours, aux_weight=0, router_std=0)
    for key, value in own.state_dict().items():
        assert torch.equal(back.state_dict()[key], value), key
    theirs.model if hasattr(theirs, "model") else theirs.transformer
    for parameter in theirs.parameters():
        parameter.data.zero_()
    assert not torch.equal(back(tokens(config)).logits_BTV, torch.zeros(()))  # a copy, not a view


@pytest.mark.parametrize("name", ["smol-gqa", "simple", "mixtral", "partial"])
def test_greedy_text_is_the_same(name):
    own = make(CASES[name][1])
    prompt_BT = tokens(own.config)[:, :5]
    theirs = to_hf(own).generate(prompt_BT, attention_mask=torch.ones_like(prompt_BT), do_sample=False, max_new_tokens=19)
    assert torch.equal(theirs, generate(own, prompt_BT, 19))
