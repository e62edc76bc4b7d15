"""How much memory do activations take? Measured: what autograd keeps from the forward to the backward pass."""

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from ..core.config import ModelConfig, MoEConfig
from ..core.model import DecoderLM


def activation_bytes(model: nn.Module, batch_size: int, seq_len: int) -> int:
    """Bytes that a forward pass with loss, in training mode, keeps for the backward pass, weights excepted: measured.

    The tensors that autograd saves are caught by its hooks; those that share memory count once. What an operation needs
    for a moment only, and gradients, come on top; so do the rows by which oneDNN rounds up those of an expert, about
    1 %. Weights, gradients, mode and torch's random state stay. Raises ValueError with gradient checkpointing, which
    keeps its tensors elsewhere.
    """
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise ValueError("what gradient checkpointing keeps is not among autograd's saved tensors; turn it off")
    own = {_memory(tensor) for tensor in (*model.parameters(), *model.buffers())}
    saved: dict[int, torch.Tensor] = {}
    training, device = model.training, next(model.parameters()).device

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if _memory(tensor) not in own:
            saved[_memory(tensor)] = tensor  # the tensor, too: memory that is given back would be counted twice
        return tensor

    config: Any = model.config
    vocab = config.vocab_size if isinstance(model, DecoderLM) else config.get_text_config().vocab_size
    # under a FLOP counter experts compute their own rows alone: what is kept does not depend on the router
    watched = FlopCounterMode(display=False)
    with torch.random.fork_rng(), torch.enable_grad(), watched, saved_tensors_hooks(keep, lambda tensor: tensor):
        tokens_BT = torch.randint(vocab, (batch_size, seq_len), device=device)
        targets_BT = torch.randint(vocab, (batch_size, seq_len), device=device)
        own |= {_memory(tokens_BT), _memory(targets_BT)}
        try:
            model.train()
            if isinstance(model, DecoderLM):
                loss = model.objective(model(tokens_BT, targets_BT))
            else:
                loss = model(tokens_BT, labels=targets_BT, use_cache=False).loss
        finally:
            model.train(training)
    total = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    del loss  # until here the graph held what it saved
    return total


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata  # not data_ptr, which is 0 for all that has no memory


def extrapolated_activation_bytes(config: ModelConfig, dtype: torch.dtype, batch_size: int, seq_len: int) -> int:
    """What `activation_bytes` finds for `config`'s model in `dtype`, without building it.

    Measured on models of one and two of its layers, from which the rest follows exactly, as layers of a kind are alike.
    (The batch is the real one: from many logits on, the loss is computed in another way.)
    """

    def measured(moe: MoEConfig | None, layers: int) -> int:
        model = DecoderLM(replace(config, n_layers=layers, moe=moe and replace(moe, layers=None))).to(dtype)
        return activation_bytes(model, batch_size, seq_len)

    n_moe = len(config.moe_layers)
    with torch.random.fork_rng():
        total = 0
        for moe, layers in ((None, config.n_layers - n_moe), (config.moe, n_moe)):
            if layers:
                one, two = measured(moe, 1), measured(moe, 2)
                total += layers * (two - one)
                rest = one - (two - one)
    return total + rest
