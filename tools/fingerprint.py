"""What identifies a machine's arithmetic: saved outputs are compared to the last digit only where it is the same."""

from __future__ import annotations

import hashlib
import platform
import sys
from importlib import metadata


def arithmetic_fingerprint() -> str:
    """Twelve hexadecimal digits that are equal on machines whose float32 training steps agree to the last bit.

    Trains a tiny network (normalisation, attention, feed-forward) for a few steps on one thread and hashes the bits of
    its weights. CPUs choose different kernels, which round differently; a version number or a CPU's name does not tell.
    """
    import torch
    from torch import nn
    from torch.nn import functional as F

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            x = torch.randn(8, 96, 96)
            norm, qkv, out = nn.LayerNorm(96), nn.Linear(96, 288), nn.Linear(96, 96)
            ffn, head = nn.Sequential(nn.Linear(96, 384), nn.GELU(), nn.Linear(384, 96), nn.SiLU()), nn.Linear(96, 2048)
            target = torch.randint(2048, (8 * 96,))
            parameters = [p for module in (norm, qkv, out, ffn, head) for p in module.parameters()]
            for _ in range(3):
                q, k, v = qkv(norm(x)).view(8, 96, 3, 4, 24).permute(2, 0, 3, 1, 4)
                attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(8, 96, 96)
                hidden = x + out(attended)
                loss = F.cross_entropy(head(hidden + ffn(F.rms_norm(hidden, (96,)))).flatten(0, 1), target)
                gradients = torch.autograd.grad(loss, parameters)
                with torch.no_grad():
                    for parameter, gradient in zip(parameters, gradients):
                        parameter -= 0.1 * gradient / (gradient.square().mean().sqrt() + 1e-8)
    finally:
        torch.set_num_threads(threads)
    digest = hashlib.sha256()
    for parameter in parameters:
        digest.update(parameter.detach().numpy().tobytes())
    return digest.hexdigest()[:12]


def provenance() -> dict[str, str]:
    """The versions and the arithmetic of this machine; stamped into a notebook's metadata when outputs are saved."""
    import torch

    names = ("numpy", "transformers", "datasets", "tokenizers", "accelerate")
    versions = {name: metadata.version(name) for name in names}
    return {
        "platform": f"{platform.system()} {platform.machine()}",
        "python": f"{sys.version_info[0]}.{sys.version_info[1]}",
        "torch": torch.__version__,
        **versions,
        "arithmetic": arithmetic_fingerprint(),
    }
