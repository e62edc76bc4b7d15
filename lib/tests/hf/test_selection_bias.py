"""Transformers classes that carry a selection bias: it moves to balance, by what training forwards chose alone."""

import pytest
import torch

from upcycling import ModelConfig, MoEConfig
from upcycling.core.model import DecoderLM
from upcycling.hf.selection_bias import SelectionBiasMover
from upcycling.routing.metrics import max_over_mean

V, D, E, K = 40, 16, 8, 2
SIZES = dict(
    vocab_size=V, hidden_size=D, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, num_experts_per_tok=K, max_position_embeddings=64, head_dim=8, bos_token_id=1,
    eos_token_id=None, pad_token_id=0, moe_intermediate_size=8,
)  # fmt: skip
DEEPSEEK = dict(
    n_routed_experts=E, num_experts=E, n_group=2, topk_group=2, n_shared_experts=1, num_shared_experts=1,
    first_k_dense_replace=0, routed_scaling_factor=1.0, norm_topk_prob=True,
)  # fmt: skip
LATENT = dict(kv_lora_rank=4, q_lora_rank=4, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8, head_dim=None)
INDEX = dict(index_n_heads=2, index_head_dim=8, index_topk=64)
SPARSE = dict(mlp_layer_types=["sparse"] * 2)
FULL = dict(layer_types=["full_attention"] * 2)
FAMILIES = {
    # the router's own bias: every class of that rule in router_rules.RULES
    "DeepseekV3": DEEPSEEK | LATENT,
    "DeepseekV32": DEEPSEEK | LATENT | INDEX | SPARSE,
    "Dots1": DEEPSEEK,
    "ExaoneMoe": DEEPSEEK | SPARSE | FULL,
    "Glm4Moe": DEEPSEEK,
    "Glm4MoeLite": DEEPSEEK | LATENT | SPARSE,
    "Glm4vMoeText": DEEPSEEK
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0]}},
    "GlmMoeDsa": DEEPSEEK | LATENT | INDEX | SPARSE,
    "SolarOpen": DEEPSEEK,
    # the bias in the layer around the router, or in a module inside it
    "Lfm2Moe": dict(num_experts=E, use_expert_bias=True, num_dense_layers=0) | FULL,
    "Ernie4_5_Moe": dict(moe_num_experts=E, moe_k=K, moe_layer_start_index=0, moe_layer_end_index=1),
    "Afmoe": dict(num_experts=E, num_shared_experts=1, num_dense_layers=0) | FULL,
    "MiniMaxM2": dict(num_local_experts=E),
    "HYV3": dict(num_experts=E, num_local_experts=E, first_k_dense_replace=0),
}


def make_model(family="Glm4Moe"):
    """A tiny random model in training mode whose routers prefer some experts for every token."""
    import transformers

    sizes = {name: value for name, value in (SIZES | FAMILIES[family]).items() if value is not None}
    torch.manual_seed(0)
    text_only = family == "Glm4vMoeText"
    model = getattr(transformers, f"{family}{'Model' if text_only else 'ForCausalLM'}")(
        getattr(transformers, f"{family}Config")(**sizes)
    )
    model.get_input_embeddings().weight.data.normal_().add_(1.0)  # a direction that all tokens share
    for name, parameter in model.named_parameters():
        if name.endswith(("mlp.gate.weight", "feed_forward.gate.weight", "mlp.router.gate.weight")):
            parameter.data = 0.1 * torch.randn(E, D) + torch.linspace(-0.1, 0.1, E)[:, None]
    return model.train()


def make_tokens(*shape, seed=1):
    return torch.randint(2, V, shape, generator=torch.Generator().manual_seed(seed))


def biases(model):
    return {
        name: tensor.clone()
        for name, tensor in [*model.named_buffers(), *model.named_parameters()]
        if name.endswith(("e_score_correction_bias", "expert_bias"))
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_the_bias_moves_until_the_load_is_even(family):
    model = make_model(family)
    counts = []
    with SelectionBiasMover(model, rate=0.02) as mover:
        for step in range(50):
            with torch.set_grad_enabled(step == 0):
                model(input_ids=make_tokens(2, 24, seed=step))
            counts.append(mover.step())
    assert len(counts[0]) >= 1
    for layer in counts[0]:
        assert int(counts[0][layer].sum()) == 2 * 24 * K
        before_E, after_E = (sum(one[layer] for one in part).double() for part in (counts[:3], counts[-20:]))
        before, after = (float(max_over_mean(counts_E / counts_E.sum())) for counts_E in (before_E, after_E))
        assert after < 1.35 < 1.7 < before, (layer, before, after)
    moved = biases(model)
    assert all(bias.abs().max() > 0 for bias in moved.values() if len(counts[0]) == len(moved))
    model(input_ids=make_tokens(2, 24))  # the hooks are gone
    assert all(torch.equal(bias, moved[name]) for name, bias in biases(model).items())


def test_without_the_mover_it_stays():
    """transformers' own training step leaves the bias alone."""
    model = make_model()
    before, optimizer = biases(model), torch.optim.AdamW(model.parameters(), lr=0.1)
    for step in range(3):
        tokens_BT = make_tokens(2, 12, seed=step)
        model(input_ids=tokens_BT, labels=tokens_BT).loss.backward()
        optimizer.step()
    assert before and all(torch.equal(bias, before[name]) for name, bias in biases(model).items())


def test_one_step_by_hand():
    model = make_model()
    mover = SelectionBiasMover(model, rate=0.5)
    chosen = []
    hook = model.model.layers[1].mlp.gate.register_forward_hook(lambda _m, _i, out: chosen.append(out[2]))
    for seed in range(3):  # three micro-batches, of two sizes
        model(input_ids=make_tokens(2, 6 + 6 * (seed == 2), seed=seed))
    hook.remove()
    counts = mover.step()
    expected_E = torch.cat(chosen).flatten().bincount(minlength=E)
    assert torch.equal(counts["model.layers.1.mlp.gate"], expected_E)
    mean = expected_E.float().mean()
    bias_E = model.model.layers[1].mlp.gate.e_score_correction_bias
    assert bias_E.tolist() == [0.5 * float((mean - count).sign()) for count in expected_E]
    with pytest.raises(RuntimeError, match=r"model\.layers\.0\.mlp\.gate chose no expert since the last step"):
        mover.step()


def test_what_is_not_counted():
    """Evaluation, recomputation under gradient checkpointing, padding."""
    model = make_model()
    with SelectionBiasMover(model) as mover:
        for kwargs in ({}, {"gradient_checkpointing_kwargs": {"use_reentrant": True}}):
            model.gradient_checkpointing_enable(**kwargs)
            embeddings = model.get_input_embeddings()(make_tokens(2, 12))
            model(inputs_embeds=embeddings).logits.sum().backward()
            assert {int(counts_E.sum()) for counts_E in mover.step().values()} == {2 * 12 * K}, "once, not twice"
        model.gradient_checkpointing_disable()

        mask_BT = torch.ones(2, 12, dtype=torch.long)
        mask_BT[0, :5] = 0
        model(input_ids=make_tokens(2, 12), attention_mask=mask_BT)
        model.eval()
        model(input_ids=make_tokens(2, 12))
        model.train()
        assert {int(counts_E.sum()) for counts_E in mover.step().values()} == {(24 - 5) * K}


def test_in_transformers_trainer(tmp_path):
    """Three updates of two micro-batches: three steps of the bias, whatever happens in evaluation."""
    from transformers import Trainer, TrainingArguments

    model = make_model()
    mover = SelectionBiasMover(model, rate=2**-10)
    rows = [{"input_ids": row, "labels": row} for row in make_tokens(12, 12)]
    settings = TrainingArguments(
        tmp_path, max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2, eval_strategy="steps",
        eval_steps=1, report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    Trainer(model, settings, train_dataset=rows, eval_dataset=rows[:2], callbacks=[mover.callback()]).train()
    for bias_E in biases(model).values():
        steps_E = bias_E * 2**10
        assert torch.equal(steps_E, steps_E.round()) and 0 < steps_E.abs().max() <= 3
        assert (steps_E.abs() == 3).any(), "the most preferred expert lost a step each time"


def test_half_precision_does_not_lose_the_steps():
    model = make_model("Lfm2Moe").bfloat16()
    with SelectionBiasMover(model) as mover:
        for bias_E in biases(model).values():
            assert bias_E.dtype == torch.float32
        model.model.layers[0].feed_forward.expert_bias.fill_(0.5)  # where bfloat16 stands 0.004 apart
        model(input_ids=make_tokens(2, 12))
        mover.step()
    moved_E = model.model.layers[0].feed_forward.expert_bias - 0.5
    torch.testing.assert_close(moved_E.abs().max(), torch.tensor(1e-3), atol=1e-6, rtol=0)


def test_a_model_that_moves_elsewhere_keeps_its_bias():
    """`to` replaces buffers; the mover must change those that the model now has."""
    model = make_model()
    mover = SelectionBiasMover(model)
    model.bfloat16()
    model(input_ids=make_tokens(2, 12))
    mover.step()
    assert all(bias.abs().max() > 0 for bias in biases(model).values())


def test_refusals():
    config = ModelConfig.smol(vocab_size=9, d_model=8, n_layers=1, n_heads=2, d_ff=8, seq_len=8, moe=MoEConfig(4, 2))
    with pytest.raises(ValueError, match=r'MoEConfig\(router="selection_bias"\)'):
        SelectionBiasMover(DecoderLM(config))
    with pytest.raises(ValueError, match="Linear has no e_score_correction_bias or expert_bias"):
        SelectionBiasMover(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="rate=-1 is negative"):
        SelectionBiasMover(make_model(), rate=-1)
