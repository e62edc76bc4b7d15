"""DecoderLM to and from Hugging Face's own classes: Llama, GPT-2, Mixtral and, for what Mixtral lacks, Qwen2-MoE.

    RMSNorm, RoPE, SwiGLU, dense                  LlamaForCausalLM
    the same, all layers MoE, renormalised        MixtralForCausalLM
    the same, some layers MoE, or not normalised  Qwen2MoeForCausalLM with an empty shared expert
    LayerNorm, learned positions, GELU or ReLU    GPT2LMHeadModel

Each weight is copied once into its place, each setting carried; the logits agree to rounding. What has no exact
counterpart is refused with the name of the setting, in both directions.

- `weights.py`        `to_hf`, `from_hf`, `save_hf`; `names.json` says which of our weights stand in which of theirs
- `configuration.py`  the settings, and the refusals

What may never come in: a class or a model file of our own; what is written here loads without this library.
"""

from .weights import from_hf, save_hf, to_hf

__all__ = ["from_hf", "save_hf", "to_hf"]
