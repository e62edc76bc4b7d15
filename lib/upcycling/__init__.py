"""Dense -> Mixture-of-Experts upcycling of language models: the library beneath the notebooks.

Names are loaded when they are first used, so that `import upcycling` costs nothing.
"""

from __future__ import annotations

import importlib

_HOME = {
    "config": ["ModelConfig", "MoEConfig", "TrainConfig", "PRESETS", "REFERENCE", "count_parameters", "forward_flops"],
    "corpus": ["load_corpus", "entropy_floor"],
    "tokens": ["train_tokenizer", "load_tokenizer", "save_tokenizer", "TokenStream", "padded_batch"],
    "moe": ["MoELayer", "Routing", "route", "aux_loss", "z_loss", "expert_load", "pooled_aux_loss"],
    "routers": ["TopK", "Sampled", "SelectionBias", "StraightThrough", "TopP", "ReLURouter", "Hash", "ExpertChoice"],
    "selection_bias": ["SelectionBiasMover"],
    "model": ["DecoderLM"],
    "transfer": ["upcycle", "double", "router_rows"],
    "moments": ["carry_moments"],
    "jumps": ["initial_jumps"],
    "initialisation": ["Copy", "Noise", "Drop", "Permute", "Granular", "Partition"],
    "equivalence": ["check_equivalence", "check_causality"],
    "checkpoint": ["save_model", "load_model"],
    "training": ["train", "evaluate"],
    "generation": ["generate"],
    "huggingface": ["to_hf", "from_hf", "save_hf"],
    "environment": ["check_environment"],
    "intervention": ["intervene", "knockout", "token_losses", "domain_losses"],
    "metrics": ["shuffled_baseline", "uniform_baseline"],
    "pretrained": ["plan", "upcycle_pretrained"],
    "receipt": ["verify"],
    "conversion": ["convert"],
    "continued": ["continue_pretraining"],
    "diagnosis": ["load_report", "evaluate_routing", "diagnose_router"],
    "explorer": ["TokenExplorer", "TrainingPlayback", "WhatIf", "CompareRouting"],
    "selection": ["select", "score_documents", "Selection", "quotas"],
    "series": ["load_series"],
    "routing": ["record_routing", "RoutingTrace"],
    "report": ["save_report"],
    "accounting": ["account", "side_by_side", "flop_counter", "published_claims"],
    "profiling": ["time_by_kind"],
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}
__all__ = sorted(_MODULE_OF)
__version__ = "0.1.0"


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'upcycling' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__():
    return __all__
