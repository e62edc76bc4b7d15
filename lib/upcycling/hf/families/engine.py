"""From a family and a target class to the configuration and tensors of the MoE."""

from __future__ import annotations

import copy as _copy
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .base import Fields, Initialisation, Refusal, Target, TargetTensor, kept

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def configure(
    config: PreTrainedConfig, rule: Callable[[Fields], Target], *, num_experts: int, top_k: int, layers: tuple[int, ...]
) -> tuple[Target, PreTrainedConfig, dict[str, str]]:
    """(Target, the MoE's configuration, the account of the dense fields); Refusal where it cannot be done.

    `layers` are the indices of the MoE layers; the others stay dense where the class knows how.
    """
    import transformers

    fields = Fields(config)
    target = rule(fields)
    fields.finish()
    moe, depth = target.moe, config.num_hidden_layers
    if num_experts < moe.fewest_experts:
        raise Refusal(
            f"{moe.name}'s router cannot run with {num_experts} expert", f"at least {moe.fewest_experts} experts"
        )
    settings = {**moe.settings, moe.top_k: top_k}
    if len(layers) < depth:
        if moe.dense_layers is None:
            raise Refusal(
                f"{moe.name} has no dense layers, so all {depth} layers become MoE layers or none", "leave out layers="
            )
        dense = [i for i in range(depth) if i not in layers]
        if moe.dense_layers == "mlp_only_layers":
            settings["mlp_only_layers"] = dense
        else:
            settings["mlp_layer_types"] = ["dense" if i in dense else "sparse" for i in range(depth)]
    config_class = getattr(transformers, moe.name).config_class
    values = {**fields.target, **settings}
    declared = set(config_class.__dataclass_fields__) | set(config_class.attribute_map) | {"output_attentions"}
    undeclared = sorted(
        name for name in values if name not in declared | set(moe.read_by_getattr) and values[name] is not None
    )
    if undeclared:
        raise AssertionError(f"the rule sets {', '.join(undeclared)}, which {config_class.__name__} does not have")
    moe_config = config_class(**values, num_experts=num_experts, num_local_experts=num_experts)
    # Written past the class's alias, so that config.json gets both names: each is what some reader looks for.
    vars(moe_config).update(num_experts=num_experts, num_local_experts=num_experts)
    moe_config.architectures = [moe.name]
    return target, moe_config, fields.account


def hub_shapes(config: PreTrainedConfig, class_name: str) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """(Name -> shape of each tensor that `save_pretrained` writes for this class, tied name -> its twin); no memory."""
    import transformers
    from transformers.initialization import no_init_weights

    with torch.device("meta"), no_init_weights():
        model = getattr(transformers, class_name)._from_config(_copy.deepcopy(config))
    return {name: tuple(tensor.shape) for name, tensor in hub_tensors(model).items()}, dict(model.all_tied_weights_keys)


def hub_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """A model's tensors under the names that `save_pretrained` writes, a tied one once."""
    from transformers.core_model_loading import revert_weight_conversion

    tensors = revert_weight_conversion(model, model.state_dict())
    return {name: tensor for name, tensor in tensors.items() if name not in model.all_tied_weights_keys}


def _pattern(name: str) -> re.Pattern:
    escaped = re.escape(name).replace(r"\{layer\}", r"(?P<layer>\d+)").replace(r"\{expert\}", r"(?P<expert>\d+)")
    return re.compile(escaped + r"\Z")


def build(
    target: Target,
    dense_shapes: Mapping[str, tuple[int, ...]],
    moe_shapes: Mapping[str, tuple[int, ...]],
    how: Initialisation,
) -> tuple[TargetTensor, ...]:
    """The target tensors, layer by layer. ValueError naming one without a source, or a source that nothing uses."""
    table = [(_pattern(name), rule) for name, rule in {**target.moe.tensors, **target.tensors}.items()]
    table.append((re.compile("(?P<name>.+)"), kept("{name}")))  # what no table names is a copy
    made = []
    for name, shape in moe_shapes.items():
        match, rule = next((m, rule) for pattern, rule in table if (m := pattern.match(name)))
        sources = tuple(source.format(**match.groupdict()) for source in rule.sources)
        found = re.search(r"\.layers\.(\d+)\.", name)
        layer = None if found is None else int(found[1])
        missing = [source for source in sources if source not in dense_shapes]
        if missing:
            raise ValueError(
                f"{name} of {target.moe.name} would be made from {missing[0]}, which the dense model does not have"
            )
        made.append(TargetTensor(name, tuple(shape), sources, rule.kind, layer, rule, how))
    unused = sorted(set(dense_shapes) - {source for tensor in made for source in tensor.sources})
    if unused:
        raise ValueError(
            f"{unused[0]} of the dense model is used nowhere in {target.moe.name} ({len(unused)} such tensors)"
        )
    return tuple(sorted(made, key=lambda t: (t.layer is not None, t.layer or 0)))
