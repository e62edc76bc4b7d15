"""A transformers model upcycled in memory."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from ..routing.hf_routers import check_model
from .families.engine import hub_tensors
from .plan import dtype_name, plan
from .receipt import use_eager_if_needed
from .sources import check_loading, load_dense, quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def upcycle_pretrained(
    model_or_folder: PreTrainedModel | str | os.PathLike, num_experts: int = 8, top_k: int = 2, *,
    layers: Iterable[int] | None = None, router_std: float = 0.02, init: str = "copy", noise: float = 0.05,
    seed: int = 0, dtype: torch.dtype | None = None,
) -> PreTrainedModel:  # fmt: skip
    """A stock transformers MoE with the logits of a dense model (or its folder or hub name); settings as in `plan`.

    Returns a new model on the dense model's device and in its mode, with its generation configuration; the dense model
    is unchanged. A folder's weights are read from safetensors only, and no code in it is run. Raises ValueError where
    no class fits (see `plan`), a tensor has no place or is not finite, FileNotFoundError where there is no model, and
    TypeError for what is not a transformers model.
    """
    import transformers

    layers = layers if layers is None or isinstance(layers, str) else list(layers)
    settings: dict[str, Any] = dict(
        num_experts=num_experts, top_k=top_k, layers=layers, router_std=router_std, init=init, noise=noise, seed=seed,
        dtype=dtype,
    )  # fmt: skip
    dense = model_or_folder
    if isinstance(dense, str | os.PathLike):
        plan(dense, **settings).or_refusal()  # what is refused is refused before any weight is read
        dense = load_dense(dense, dtype or "auto")
    check_model(dense, "upcycle_pretrained", or_else=" or a folder")
    dense_config = copy.deepcopy(dense.config)
    dense_config.dtype = dense.dtype
    carried_out = plan(dense_config, **settings).or_refusal()
    weights = hub_tensors(dense)
    carried_out.check_sources(weights)
    everything = dense.state_dict()
    for name, twin in carried_out.tied.items():
        if not torch.equal(everything[name], everything[twin]):
            raise ValueError(
                f"{name} is not {twin} although the configuration ties them; set tie_word_embeddings=False"
            )
    made = {}
    for tensor in carried_out.tensors:
        # A source keeps its own dtype unless another is asked for; what is new has the model's.
        to = dtype if tensor.sources else carried_out.dtype
        sources = [weights[name] for name in tensor.sources]
        value = tensor.make(*sources, dtype=to)
        if not value.isfinite().all():
            broken = [name for name, source in zip(tensor.sources, sources) if not source.isfinite().all()]
            raise ValueError(
                f"{broken[0]} of the dense model has values that are not finite (NaN or infinity): mend it first"
                if broken
                else f"{tensor.name} has values too large for {dtype_name(value.dtype)}; choose dtype=torch.bfloat16"
            )
        # transformers keeps what it is given and stacks only single experts; the dense model's memory stays its own.
        shared = any(value.untyped_storage().data_ptr() == s.untyped_storage().data_ptr() for s in sources)
        made[tensor.name] = value.clone() if shared and tensor.kind != "expert" else value
    with quiet():
        moe, loading = getattr(transformers, str(carried_out.target)).from_pretrained(
            None, config=carried_out.config, state_dict=made, dtype=carried_out.dtype,
            attn_implementation=dense.config._attn_implementation, output_loading_info=True,
        )  # fmt: skip
    check_loading(loading, str(carried_out.target))
    use_eager_if_needed(moe)
    moe.generation_config = copy.deepcopy(dense.generation_config)
    return moe.to(dense.device).train(dense.training)
