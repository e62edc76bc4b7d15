"""Dense -> Mixture-of-Experts upcycling of language models: the library beneath the notebooks.

The imports below are the whole public list. Type checkers and editors read them as they stand; at run time a name is
imported when it is first used, so that `import upcycling` costs nothing.

The folders, from the ground up (each has a page that says what lives there; a folder imports only those before it):
kernels, core, text, training, decoding, variants, routing, hf, cost and selection, experiments, show, bench. To learn
how upcycling works, read core, then text and training; README.md gives the files in order.
"""

from __future__ import annotations

import ast
import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .core.balance import aux_loss as aux_loss, pooled_aux_loss as pooled_aux_loss, z_loss as z_loss
    from .core.config import ModelConfig as ModelConfig, MoEConfig as MoEConfig
    from .core.equivalence import check_causality as check_causality, check_equivalence as check_equivalence
    from .core.initialisation import Copy as Copy, Drop as Drop, Noise as Noise, Permute as Permute
    from .core.model import DecoderLM as DecoderLM
    from .core.moe import MoELayer as MoELayer
    from .core.routers import (
        ExpertChoice as ExpertChoice,
        Hash as Hash,
        ReLURouter as ReLURouter,
        Sampled as Sampled,
        SelectionBias as SelectionBias,
        StraightThrough as StraightThrough,
        TopK as TopK,
        TopP as TopP,
    )
    from .core.routing import Routing as Routing, expert_load as expert_load, route as route
    from .core.shards import Granular as Granular, Partition as Partition
    from .core.transfer import upcycle as upcycle
    from .cost.account import account as account, flop_counter as flop_counter, side_by_side as side_by_side
    from .cost.parts import count_parameters as count_parameters, forward_flops as forward_flops
    from .cost.profile import time_by_kind as time_by_kind
    from .cost.references import REFERENCE as REFERENCE, published_claims as published_claims
    from .decoding.generation import generate as generate
    from .environment import check_environment as check_environment
    from .experiments.presets import PRESETS as PRESETS
    from .experiments.series import load_series as load_series
    from .hf.continued import continue_pretraining as continue_pretraining
    from .hf.convert import convert as convert
    from .hf.decoder_lm import from_hf as from_hf, save_hf as save_hf, to_hf as to_hf
    from .hf.plan import plan as plan
    from .hf.receipt import verify as verify
    from .hf.selection_bias import SelectionBiasMover as SelectionBiasMover
    from .hf.upcycle_pretrained import upcycle_pretrained as upcycle_pretrained
    from .routing.gradient import diagnose_router as diagnose_router
    from .routing.intervention import (
        domain_losses as domain_losses,
        intervene as intervene,
        knockout as knockout,
        token_losses as token_losses,
    )
    from .routing.load import evaluate_routing as evaluate_routing, load_report as load_report
    from .routing.metrics import shuffled_baseline as shuffled_baseline, uniform_baseline as uniform_baseline
    from .routing.record import record_routing as record_routing
    from .routing.trace import RoutingTrace as RoutingTrace
    from .selection.choose import Selection as Selection, select as select
    from .selection.quotas import quotas as quotas
    from .selection.scores import score_documents as score_documents
    from .show.explorer import (
        CompareRouting as CompareRouting,
        TokenExplorer as TokenExplorer,
        TrainingPlayback as TrainingPlayback,
    )
    from .show.report import save_report as save_report
    from .show.what_if import WhatIf as WhatIf
    from .text.corpus import entropy_floor as entropy_floor, load_corpus as load_corpus
    from .text.stream import TokenStream as TokenStream, padded_batch as padded_batch
    from .text.tokenizer import (
        load_tokenizer as load_tokenizer,
        save_tokenizer as save_tokenizer,
        train_tokenizer as train_tokenizer,
    )
    from .training.checkpoint import load_model as load_model, save_model as save_model
    from .training.config import TrainConfig as TrainConfig
    from .training.evaluation import evaluate as evaluate
    from .training.loop import train as train
    from .variants.domain_rows import router_rows as router_rows
    from .variants.doubling import double as double
    from .variants.jumps import initial_jumps as initial_jumps
    from .variants.moments import carry_moments as carry_moments
else:  # what a program sees; for a type checker a misspelt name stays an error

    def _read_imports() -> dict[str, str]:
        """Name -> module below the library, of the imports under TYPE_CHECKING."""
        source = ast.parse(__spec__.loader.get_source(__name__))
        (block,) = [node for node in source.body if isinstance(node, ast.If)]
        return {name.name: node.module for node in block.body for name in node.names}

    _HOME = _read_imports()
    __all__ = sorted(_HOME)

    def __getattr__(name):
        if name not in _HOME:
            raise AttributeError(f"module 'upcycling' has no attribute {name!r}")
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)

    def __dir__():
        return __all__


__version__ = "0.1.0"
