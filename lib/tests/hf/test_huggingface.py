"""DecoderLM to and from transformers' classes: the same logits both ways, and a reason where that is impossible."""

import json
import os
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings, strategies as st
from real_models import TINY_LLAMA, difference as logits_difference

from upcycling import DecoderLM, ModelConfig, MoEConfig, from_hf, generate, save_hf, to_hf, train_tokenizer

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
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
    return logits_difference(own(tokens_BT).logits_BTV, theirs(tokens_BT).logits)


def greedy(theirs, prompt_BT, new: int):
    mask_BT = torch.ones_like(prompt_BT)
    return theirs.generate(prompt_BT, attention_mask=mask_BT, do_sample=False, max_new_tokens=new)


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
    before_BTV = back(tokens(config)).logits_BTV
    for parameter in theirs.parameters():
        parameter.data.zero_()
    assert torch.equal(back(tokens(config)).logits_BTV, before_BTV)  # copies, not views


@pytest.mark.parametrize("name", ["smol-gqa", "simple", "mixtral", "partial"])
def test_greedy_text_is_the_same(name):
    own = make(CASES[name][1])
    prompt_BT = tokens(own.config)[:, :5]
    theirs = to_hf(own).generate(
        prompt_BT, attention_mask=torch.ones_like(prompt_BT), do_sample=False, max_new_tokens=19
    )
    assert torch.equal(theirs, generate(own, prompt_BT, 19))


def test_half_precision_keeps_the_angles_and_the_mode():
    theirs = to_hf(make(CASES["mixtral"][1]).to(torch.bfloat16).train())
    assert theirs.dtype == torch.bfloat16 and theirs.training
    assert theirs.model.rotary_emb.inv_freq.dtype == torch.float32  # bfloat16 would turn by other angles
    back = from_hf(theirs)
    assert back.token_embedding.weight.dtype == torch.bfloat16 and back.training


def test_tokenizer_and_special_tokens_come_along(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = train_tokenizer(["once upon a time there was a fox", "the fox had a hat"] * 8, vocab_size=280)
    own = make(ModelConfig.smol(**{**SIZES, "vocab_size": tokenizer.get_vocab_size()}))
    save_hf(own, tmp_path, tokenizer)
    save_hf(own, tmp_path, tokenizer)  # again, over the former files
    assert not list(tmp_path.parent.glob("*.tmp"))
    theirs, loaded = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    ids = loaded("the fox", return_tensors="pt").input_ids
    assert ids.tolist() == [tokenizer.encode("the fox").ids]
    eos = tokenizer.token_to_id("<|im_end|>")
    assert theirs.config.eos_token_id == loaded.eos_token_id == eos
    assert theirs.config.bos_token_id == loaded.bos_token_id == tokenizer.token_to_id("<|im_start|>")
    assert theirs.config.pad_token_id == loaded.pad_token_id == tokenizer.token_to_id("<|unknown|>")
    with torch.no_grad():  # the end of the text becomes the most probable token: both stop there
        own.head.weight[eos] = 100 * own.head.weight[int(own(ids).logits_BTV[0, -1].argmax())]
    text_BT = greedy(to_hf(own, tokenizer), ids, 9)
    assert text_BT.shape[1] < ids.shape[1] + 9 and torch.equal(text_BT, generate(own, ids, 9, eos_id=eos))
    with pytest.raises(ValueError, match=r"the tokenizer has .* and the model only 61"):
        to_hf(make(CASES["smol"][1]), tokenizer)


@pytest.mark.parametrize("name", ["smol", "simple", "mixtral"])
def test_trainer_trains_saves_and_generates(name, tmp_path):
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    own = make(CASES[name][1])
    theirs = to_hf(own)
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(61, (8, 12)).tolist()]
    arguments = TrainingArguments(
        tmp_path / "run", max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2, use_cpu=True, report_to=[],
        save_strategy="no", disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    trainer = Trainer(theirs, arguments, train_dataset=rows)
    trainer.train()
    assert difference(own, theirs) > 1e-3  # it learned something
    trainer.save_model(tmp_path / "trained")
    weights = {file.name for file in (tmp_path / "trained").iterdir()} - {"training_args.bin"}
    assert weights == {"config.json", "generation_config.json", "model.safetensors"}
    assert json.loads((tmp_path / "trained/config.json").read_text())["architectures"] == [CASES[name][0]]
    trained, reloaded = from_hf(tmp_path / "trained"), AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    assert difference(trained, reloaded) <= 1e-5
    prompt_BT = tokens(own.config)[:, :4]
    assert torch.equal(greedy(reloaded, prompt_BT, 6), generate(trained, prompt_BT, 6))


@torch.no_grad()
def test_transformers_adds_the_balance_loss_in_our_size():
    own, tokens_BT = make(CASES["mixtral"][1]), tokens(CASES["mixtral"][1])
    moe = own.config.moe
    for block in own.blocks:  # zero routers: all layers agree, so that pooling them changes nothing
        block.ffn.router.weight.zero_()
    theirs, ours = to_hf(own), own(tokens_BT, targets_BT=tokens_BT)
    with_it = theirs(tokens_BT, labels=tokens_BT).loss
    without = theirs(tokens_BT, labels=tokens_BT, output_router_logits=False).loss
    assert float(with_it - without) == pytest.approx(moe.aux_weight * float(ours.aux_losses_L.sum()), rel=1e-3)
    assert not to_hf(make(replace(own.config, moe=replace(moe, aux_weight=0.0)))).config.output_router_logits


# ---------------------------------------------------------------------------------------------- drawn configurations


@st.composite
def configurations(draw):
    """A DecoderLM's configuration of Llama's or GPT-2's kind, dense or with experts, that some class can hold."""
    heads = draw(st.sampled_from([1, 2, 4]))
    sizes = dict(
        vocab_size=draw(st.integers(5, 40)), d_model=8 * heads, n_layers=draw(st.integers(1, 3)), n_heads=heads,
        d_ff=8 * draw(st.integers(1, 4)), seq_len=draw(st.integers(4, 20)), tie_embeddings=draw(st.booleans()),
        norm_eps=draw(st.sampled_from([1e-6, 1e-5, 3e-2])),
    )  # fmt: skip
    if draw(st.booleans()):
        activation = draw(st.sampled_from(["gelu", "gelu_tanh", "relu"]))
        return ModelConfig.simple(**sizes, activation=activation, dropout=draw(st.sampled_from([0.0, 0.1])))
    sizes |= dict(
        n_kv_heads=draw(st.sampled_from([n for n in (1, 2, 4) if heads % n == 0])),
        rope_theta=draw(st.sampled_from([100.0, 1e4])),
    )
    if draw(st.booleans()):
        bias = draw(st.booleans())
        biases = dict(qkv_bias=bias, attention_out_bias=bias, ffn_bias=draw(st.booleans()))
        return replace(ModelConfig.smol(**sizes), **biases)
    experts = draw(st.integers(1, 6))
    layers = draw(st.none() | st.sets(st.integers(0, sizes["n_layers"] - 1), min_size=1).map(sorted).map(tuple))
    moe = MoEConfig(
        num_experts=experts, top_k=draw(st.integers(1, experts)), renormalize=draw(st.booleans()), router_std=1.0,
        layers=None if layers == tuple(range(sizes["n_layers"])) else layers,
        aux_weight=draw(st.sampled_from([0.0, 0.01, 1.0])),
    )  # fmt: skip
    return replace(ModelConfig.smol(**sizes, moe=moe), qkv_bias=draw(st.booleans()))


@settings(max_examples=25, deadline=None)
@given(configurations())
@torch.no_grad()
def test_any_configuration_and_its_logits_come_back(config):
    """from_hf(to_hf(model)): the same settings, the same weights, the same logits in between."""
    own = make(config)
    theirs = to_hf(own)
    assert difference(own, theirs) <= 1e-5
    back = from_hf(theirs)
    expected = config
    if theirs.config.model_type == "gpt2":  # its class always has these biases: zeros where we have none
        expected = replace(config, n_kv_heads=None, qkv_bias=True, attention_out_bias=True, ffn_bias=True)
    if config.moe:  # the router's standard deviation is of the start only
        weight = pytest.approx(config.moe.aux_weight)
        assert back.config.moe.aux_weight == weight
        kept = dict(aux_weight=back.config.moe.aux_weight, router_std=back.config.moe.router_std)
        expected = replace(config, moe=replace(config.moe, **kept))
    assert back.config == expected
    assert all(torch.equal(back.state_dict()[name], value) for name, value in own.state_dict().items())


SMOL, SIMPLE = CASES["smol"][1], CASES["simple"][1]


@pytest.mark.parametrize(
    "config, reason",
    [
        (ModelConfig.nano(**SIZES), "head_bias=True.*train with head_bias=False"),
        (replace(SMOL, causal=False), "causal=False"),
        (replace(SMOL, position="none"), "position='none'.*nearest are ModelConfig.smol"),
        (replace(SMOL, norm="layernorm"), "norm='layernorm'.*nearest"),
        (replace(SMOL, activation="gelu"), "activation='gelu'.*nearest"),
        (replace(SMOL, position="learned"), "position='learned'.*nearest"),
        (replace(SMOL, dropout=0.1), "dropout=0.1.*dropout=0.0"),
        (replace(SIMPLE, n_kv_heads=2), "n_kv_heads=2: GPT-2"),
        (replace(SIMPLE, moe=MOE), "activation='gelu': no standard class has experts without a gate"),
        (replace(SMOL, moe=replace(MOE, router_bias=True)), "router_bias=True.*router_bias=False"),
        (replace(SMOL, moe=replace(MOE, noisy=True)), "noisy=True.*noisy=False"),
        (replace(SMOL, ffn_bias=True, moe=MOE), "ffn_bias=True.*ffn_bias=False"),
        (replace(SMOL, attention_out_bias=True, moe=MOE), "attention_out_bias=True"),
    ],
)
def test_what_has_no_class_is_refused_by_name(config, reason):
    with pytest.raises(ValueError, match=reason):
        to_hf(DecoderLM(config))


def test_gpt2_keeps_its_dropout():
    config = replace(SIMPLE, dropout=0.1)
    theirs = to_hf(DecoderLM(config))
    assert theirs.config.resid_pdrop == theirs.config.embd_pdrop == theirs.config.attn_pdrop == 0.1
    assert from_hf(theirs).config.dropout == 0.1


TINY = dict(vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
TINY |= dict(intermediate_size=40, max_position_embeddings=24, bos_token_id=None, eos_token_id=None)
THEIRS = {
    "llama": TINY,
    "gpt2": dict(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=24, bos_token_id=None, eos_token_id=None)
    | dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    "mixtral": TINY | dict(num_local_experts=4),
    "qwen2_moe": TINY | dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=40)
    | dict(shared_expert_intermediate_size=0),
}  # fmt: skip


def alternatives(name, value):
    """Other values that a field could have."""
    if name == "rope_parameters":
        yield from (value | {"rope_theta": 50.0}, value | {"partial_rotary_factor": 0.5})
        yield value | {"rope_type": "linear", "factor": 2.0}
    elif isinstance(value, bool):
        yield not value
    elif isinstance(value, int | float):
        yield from (value * 2, value + 1, 0.5)
    elif isinstance(value, str):
        yield from ("relu", "gelu", "gelu_new", "tanh")
    elif isinstance(value, list):
        yield from ([0], ["sliding_attention"] * 2)
    elif value is None:
        yield from (1, 3, 8, 16, True)


def fields():
    from transformers import AutoConfig

    for kind, values in THEIRS.items():
        for name in AutoConfig.for_model(kind, **values).to_dict():
            if name not in ("model_type", "transformers_version", "_name_or_path", "dtype", "id2label", "label2id"):
                yield kind, name


@pytest.mark.parametrize("kind, name", fields())
def test_each_field_of_theirs_is_carried_or_refused(kind, name):
    """Change one field, build the model that transformers makes of it: from_hf has its logits, or says no."""
    from transformers import AutoConfig, AutoModelForCausalLM

    base = AutoConfig.for_model(kind, **THEIRS[kind]).to_dict()
    for value in alternatives(name, base[name]):
        try:
            theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**base, name: value})).eval()
            with torch.no_grad():
                for parameter in theirs.parameters():
                    parameter.normal_(std=0.3)
            length = min(24, theirs.config.max_position_embeddings)
            logits_BTV = theirs(tokens(SMOL)[:, :length]).logits
        except Exception:  # no such model exists
            continue
        try:
            own = from_hf(theirs)
        except ValueError as refusal:
            blamed = "head_dim" if name in ("hidden_size", "num_attention_heads") else name
            assert blamed in str(refusal), refusal
            continue
        diff = logits_difference(logits_BTV, own(tokens(SMOL)[:, :length]).logits_BTV)
        assert diff <= 1e-5, value


@pytest.mark.parametrize(
    "kind, field, reason",
    [
        (
            "llama",
            dict(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
            "rope_type='linear'",
        ),
        ("llama", dict(head_dim=16), "head_dim=16"),
        ("llama", dict(attention_dropout=0.1), "attention_dropout=0.1"),
        ("llama", dict(hidden_act="gelu"), "hidden_act='gelu'"),
        ("llama", dict(logit_scale=2.0), "logit_scale=2.0 is not known for LlamaConfig and could change it"),
        ("gpt2", dict(attn_pdrop=0.3), "attn_pdrop are 0.0, 0.0, 0.3"),
        ("gpt2", dict(activation_function="silu"), "activation_function='silu'"),
        ("mixtral", dict(sliding_window=8), "sliding_window=8"),
        ("mixtral", dict(router_jitter_noise=0.1), "router_jitter_noise=0.1"),
        ("qwen2_moe", dict(shared_expert_intermediate_size=8), "shared_expert_intermediate_size=8"),
        ("qwen2_moe", dict(mlp_only_layers=[0], intermediate_size=24), "moe_intermediate_size=40 differs"),
    ],
)
def test_fields_that_decoderlm_cannot_express(kind, field, reason):
    from transformers import AutoConfig, AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**THEIRS[kind], **field}))
    with pytest.raises(ValueError, match=reason):
        from_hf(theirs)


def test_other_families_weights_and_places_are_refused(tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaForSequenceClassification

    with pytest.raises(ValueError, match=r"model_type='qwen3' has no DecoderLM.*upcycle_pretrained"):
        from_hf(AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **TINY)))
    classifier = LlamaForSequenceClassification(AutoConfig.for_model("llama", **TINY))
    with pytest.raises(ValueError, match=r"the weight score\.weight has no place in DecoderLM"):
        from_hf(classifier)
    with pytest.raises(TypeError, match="not a DecoderLM"):
        from_hf(make(SMOL))
    with pytest.raises(TypeError, match="to_hf takes a DecoderLM, not a LlamaForSequenceClassification"):
        to_hf(classifier)
    with pytest.raises(TypeError, match=r"the tokenizer is a str, .*backend_tokenizer"):
        to_hf(make(SMOL), "tokenizer.json")
    with pytest.raises(OSError, match="no model could be read from"):
        from_hf(tmp_path / "nothing")
    save_hf(make(SMOL), tmp_path / "pickled")
    (tmp_path / "pickled/model.safetensors").unlink()
    torch.save({}, tmp_path / "pickled/pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        from_hf(tmp_path / "pickled")


def test_a_head_that_is_not_the_embedding_although_tied_is_refused():
    theirs = to_hf(make(replace(SMOL, tie_embeddings=False)))
    theirs.config.tie_word_embeddings = True
    with pytest.raises(ValueError, match=r"lm_head.weight is not the embedding.*tie_word_embeddings=False"):
        from_hf(theirs)


def test_parts_of_a_sharded_model_that_was_in_the_folder_are_deleted(tmp_path):
    for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "notes.txt", "model-mine.txt"):
        (tmp_path / name).write_text("{}")
    own = make(SMOL)
    save_hf(own, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json", "generation_config.json", "model-mine.txt", "model.safetensors", "notes.txt"
    ]  # fmt: skip
    assert torch.equal(from_hf(tmp_path).head.weight, own.head.weight)


def test_a_real_llama_has_its_logits_and_its_text():
    from transformers import AutoModelForCausalLM

    theirs, own = AutoModelForCausalLM.from_pretrained(TINY_LLAMA).eval(), from_hf(TINY_LLAMA)
    assert own.config.n_kv_heads == 4 and own.config.tie_embeddings
    tokens_BT = torch.randint(3, 512, (2, 256), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected_BTV = theirs(tokens_BT).logits
        assert logits_difference(expected_BTV, own(tokens_BT).logits_BTV) <= 1e-5
        assert logits_difference(expected_BTV, to_hf(own)(tokens_BT).logits) <= 1e-5
    start_BT = torch.tensor([[1]])
    assert torch.equal(greedy(theirs, start_BT, 60), generate(own, start_BT, 60, eos_id=2))
