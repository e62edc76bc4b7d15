"""Tiny random transformers models, for the tests of what takes them: dense ones of every family, and MoE classes."""

import json
import re
from pathlib import Path

import torch

TINY = json.loads((Path(__file__).parent / "tiny_families.json").read_text(encoding="utf-8"))
"""The dense families by model type: for each the variants, as fields of its configuration beside BASE."""
BASE = dict(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, pad_token_id=None, bos_token_id=None, eos_token_id=None,
)  # fmt: skip


def make_config(kind, variant=0, **changes):
    import transformers

    return transformers.AutoConfig.for_model(kind, **{**BASE, **TINY[kind][variant], **changes})


def make_dense(kind, variant=0, **changes):
    import transformers

    model = transformers.AutoModelForCausalLM.from_config(make_config(kind, variant, **changes), dtype=torch.float32)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter) + (parameter.mean() if parameter.ndim == 1 else 0))
    return model.eval()


MOE_FAMILIES = [
    "Mixtral",
    "Qwen2Moe",
    "Qwen3Moe",
    "Olmoe",
    "FlexOlmo",
    "GraniteMoe",
    "GptOss",
    "DeepseekV3",
    "Glm4Moe",
    "Dots1",
]
V, D, E, K, LAYERS = 40, 16, 8, 3, 3


def moe_model(family, seed=0, renormalize=True):
    """A tiny random model of a transformers MoE class."""
    import transformers

    sizes = dict(
        vocab_size=V, hidden_size=D, intermediate_size=16, num_hidden_layers=LAYERS, num_attention_heads=2,
        num_key_value_heads=2, num_experts_per_tok=K, max_position_embeddings=64, head_dim=8,
        bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    experts = {"num_experts": E, "norm_topk_prob": renormalize, "moe_intermediate_size": 16}
    deepseek = dict(
        n_routed_experts=E, n_group=4, topk_group=3, n_shared_experts=1, first_k_dense_replace=1,
        moe_intermediate_size=16, routed_scaling_factor=2.5, norm_topk_prob=renormalize,
    )  # fmt: skip
    latent = dict(kv_lora_rank=4, q_lora_rank=4, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8)
    own = {
        "Mixtral": {"num_local_experts": E},
        "Qwen2Moe": experts | {"shared_expert_intermediate_size": 16, "mlp_only_layers": [1]},
        "Qwen3Moe": experts,
        "Olmoe": experts,
        "FlexOlmo": experts,
        "GraniteMoe": {"num_local_experts": E},
        "GptOss": {"num_local_experts": E, "sliding_window": 4, "layer_types": None},
        "DeepseekV3": deepseek | latent,
        "Glm4Moe": deepseek,
        "Dots1": deepseek,
    }[family]
    sizes.pop("head_dim" if family in ("GraniteMoe", "DeepseekV3") else "", None)
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**sizes | own)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if re.search(r"(gate|router)\.(weight|bias|e_score_correction_bias)$", name):
            torch.nn.init.normal_(tensor, std=0.5)  # the bias, too: it decides who is chosen
    return model.eval()
