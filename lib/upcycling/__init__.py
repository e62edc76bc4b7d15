"""Dense -> Mixture-of-Experts upcycling of language models: the library beneath the notebooks.

Names are loaded when they are first used, so that `import upcycling` costs nothing.
"""

from __future__ import annotations

import importlib

_HOME = {
    "core.config": ["ModelConfig", "MoEConfig"],
    "training.config": ["TrainConfig"],
    "experiments.presets": ["PRESETS"],
    "cost.references": ["REFERENCE", "published_claims"],
    "cost.parameters": ["count_parameters", "forward_flops"],
    "text.corpus": ["load_corpus", "entropy_floor"],
    "text.tokenizer": ["train_tokenizer", "load_tokenizer", "save_tokenizer"],
    "text.stream": ["TokenStream", "padded_batch"],
    "core.moe": ["MoELayer"],
    "core.routing": ["Routing", "route", "expert_load"],
    "core.balance": ["aux_loss", "z_loss", "pooled_aux_loss"],
    "core.routers": [
        "TopK",
        "Sampled",
        "SelectionBias",
        "StraightThrough",
        "TopP",
        "ReLURouter",
        "Hash",
        "ExpertChoice",
    ],
    "hf.selection_bias": ["SelectionBiasMover"],
    "core.model": ["DecoderLM"],
    "core.transfer": ["upcycle"],
    "variants.doubling": ["double"],
    "variants.domain_rows": ["router_rows"],
    "variants.moments": ["carry_moments"],
    "variants.jumps": ["initial_jumps"],
    "core.initialisation": ["Copy", "Noise", "Drop", "Permute"],
    "core.shards": ["Granular", "Partition"],
    "core.equivalence": ["check_equivalence", "check_causality"],
    "training.checkpoint": ["save_model", "load_model"],
    "training.loop": ["train"],
    "training.evaluation": ["evaluate"],
    "decoding.generation": ["generate"],
    "hf.decoder_lm": ["to_hf", "from_hf", "save_hf"],
    "environment": ["check_environment"],
    "routing.intervention": ["intervene", "knockout", "token_losses", "domain_losses"],
    "routing.metrics": ["shuffled_baseline", "uniform_baseline"],
    "hf.plan": ["plan"],
    "hf.upcycle_pretrained": ["upcycle_pretrained"],
    "hf.receipt": ["verify"],
    "hf.convert": ["convert"],
    "hf.continued": ["continue_pretraining"],
    "routing.load": ["load_report", "evaluate_routing"],
    "routing.gradient": ["diagnose_router"],
    "show.explorer": ["TokenExplorer", "TrainingPlayback", "CompareRouting"],
    "show.what_if": ["WhatIf"],
    "selection.choose": ["select", "Selection"],
    "selection.scores": ["score_documents"],
    "selection.quotas": ["quotas"],
    "experiments.series": ["load_series"],
    "routing.record": ["record_routing"],
    "routing.trace": ["RoutingTrace"],
    "show.report": ["save_report"],
    "cost.account": ["account", "side_by_side", "flop_counter"],
    "cost.profile": ["time_by_kind"],
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
