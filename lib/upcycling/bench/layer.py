"""The MoE layer beside a dense FFN of the same active FLOPs, transformers' experts, tutorial loops, and its floor.

All candidates of a line hold the same weights and route by the same rule; that their outputs agree is checked before
anything is timed. The floor is the matrix products alone: all rows through one expert's matrices, outputs allocated
beforehand, forward once and backward twice.
"""

import math
import statistics
from dataclasses import dataclass, replace
from itertools import cycle

import torch
from torch import nn

from ..core.config import ModelConfig, MoEConfig
from ..core.experts import activate
from ..core.model import FeedForward
from ..core.moe import MoELayer, experts_loop
from ..kernels.products import ONEDNN, fits, product
from .measure import Bench, Comparison, compared


@dataclass(frozen=True)
class Shape:
    d: int
    f: int
    experts: int
    top_k: int
    tokens: int
    activation: str = "gelu"

    def __str__(self) -> str:
        ffn = f"{self.activation} d {self.d} ff {self.f}"
        return f"{ffn}, {self.experts} experts top-{self.top_k}, {self.tokens:,} token{'s' * (self.tokens > 1)}"

    @property
    def weight_bytes(self) -> int:
        """Of all experts, in float32."""
        return 4 * (3 if self.activation == "swiglu" else 2) * self.experts * self.d * self.f

    @property
    def model(self) -> ModelConfig:
        return ModelConfig(
            vocab_size=8, d_model=self.d, n_layers=1, n_heads=1, d_ff=self.f, seq_len=8, activation=self.activation,
            ffn_bias=False, moe=MoEConfig(self.experts, self.top_k),
        )  # fmt: skip


A = Shape(256, 1024, 8, 2, 2048)
B = Shape(832, 3328, 8, 2, 2048)
C = Shape(512, 1024, 16, 2, 1024)
D = Shape(576, 1536, 8, 2, 2048, "swiglu")
TRAINING = (A, replace(A, tokens=8192), B, C, D)
FEW_TOKENS = tuple(replace(shape, tokens=tokens) for shape in (A, B) for tokens in (1, 8))

CACHE = 2**27  # more than a CPU keeps
OURS, FLOOR = "MoE layer", "its matrix products alone"
DENSE, PLAIN = "our dense FFN, same active FLOPs", "the same FFN of nn.Linear"
GROUPED, EAGER, BATCHED = ("transformers " + name for name in ("grouped_mm", "eager", "batched_mm"))
INDEX_ADD, DEFINITION = "index_add loop over modules", "the definition's loop"


def compare(bench: Bench) -> list[Comparison]:
    """Training (forward and backward) at the shapes of `TRAINING`, inference at those of `FEW_TOKENS`."""
    results = []
    for shape in (A, C) if bench.quick else TRAINING:
        results += _training(bench, shape)
    for shape in FEW_TOKENS:
        results += _few_tokens(bench, shape)
    return results


def _training(bench: Bench, shape: Shape) -> list[Comparison]:
    layers = candidates(shape, bench.device)
    layers[DENSE] = FeedForward(replace(shape.model, d_ff=shape.top_k * shape.f, moe=None)).to(bench.device)
    layers[PLAIN] = _PlainFFN(shape.d, shape.top_k * shape.f, shape.activation).to(bench.device)
    inputs = batches(shape, bench.device)
    functions = {name: forward_and_backward(layer, inputs) for name, layer in layers.items()}
    functions[FLOOR] = products(shape, bench.device)
    functions.pop(BATCHED)  # copies the weights for each row: gigabytes
    gigaflops = 6e-9 * shape.tokens * shape.top_k * shape.weight_bytes / (4 * shape.experts)
    rounds = max(4, bench.rounds // 3) if gigaflops > 40 else None
    seconds = bench.times(functions, rounds, warm_up=None if bench.quick else 5)  # each batch is a new one
    many = shape.tokens * shape.top_k / shape.experts >= 500
    as_dense = ("time", 1.06 if many else 1.20)
    goals = {
        DENSE: as_dense,
        PLAIN: as_dense,
        FLOOR: (),
        GROUPED: ("speed", 1.0),
        EAGER: ("speed", 2.0 if shape.experts == 16 else 1.25),
        INDEX_ADD: ("speed", 1.1),
        DEFINITION: ("speed",),
    }
    setting = f"forward and backward, {shape}"
    return [compared("layer", setting, seconds, OURS, peer, *goal) for peer, goal in goals.items()]


def forward_and_backward(layer: nn.Module, inputs: list[torch.Tensor], repeat: int = 1):
    """A function that takes the next `repeat` of the inputs through `layer`, and a gradient back."""
    own, gradient_ND = cycle(inputs), torch.randn_like(inputs[0])

    def run():
        for _ in range(repeat):
            x_ND = next(own)
            layer(x_ND).backward(gradient_ND)
            x_ND.grad = None
            layer.zero_grad()

    return run


def batches(shape: Shape, device: str, count: int = 20) -> list[torch.Tensor]:
    """x_ND of `count` updates: with one batch for all, each expert would always get the same number of rows."""
    return [torch.randn(shape.tokens, shape.d, device=device, requires_grad=True) for _ in range(count)]


def _few_tokens(bench: Bench, shape: Shape) -> list[Comparison]:
    """Several layers in turn, as in a model: their weights come from memory, not from the cache."""
    layers = [candidates(shape, bench.device) for _ in range(max(1, CACHE // shape.weight_bytes))]
    x_ND = torch.randn(shape.tokens, shape.d, device=bench.device)
    repeat = math.ceil(8 / len(layers))  # one call takes less than a millisecond

    def forward(name):
        @torch.no_grad()
        def calls():
            for _ in range(repeat):
                for layer in layers:
                    layer[name](x_ND)

        return calls

    names = [name for name in layers[0] if name != BATCHED or shape.weight_bytes < CACHE // 2]  # copies weights per row
    seconds = bench.times({name: forward(name) for name in names}, rounds=2 * bench.rounds)
    fastest = min({GROUPED, EAGER, BATCHED}.intersection(names), key=lambda name: statistics.median(seconds[name]))
    goal = 1.3 if shape.d <= 256 else 1.0
    return [compared("layer", f"forward, {shape}", seconds, OURS, fastest, "speed", goal)]


class Output(nn.Module):
    """Our layer, its output alone."""

    def __init__(self, layer: MoELayer):
        super().__init__()
        self.layer = layer

    def forward(self, x_ND):
        return self.layer(x_ND)[0]


class _Definition(Output):
    """Our layer, computed by the loop that defines it."""

    def forward(self, x_ND):
        return experts_loop(self.layer.experts, x_ND, self.layer.route(x_ND))


class _PlainFFN(nn.Module):
    """An FFN of torch's own `nn.Linear`."""

    def __init__(self, d: int, f: int, activation: str):
        super().__init__()
        self.activation = activation
        self.up, self.down = nn.Linear(d, f, bias=False), nn.Linear(f, d, bias=False)
        self.gate = nn.Linear(d, f, bias=False) if activation == "swiglu" else None

    def forward(self, x):
        return self.down(activate(self.activation, self.up(x), None if self.gate is None else self.gate(x)))


class _Tutorial(nn.Module):
    """What tutorials write: a module for each expert, a mask, index_add."""

    def __init__(self, layer: MoELayer, shape: Shape):
        super().__init__()
        self.router, self.shape = layer.router, shape
        self.experts = nn.ModuleList(_PlainFFN(shape.d, shape.f, shape.activation) for _ in range(shape.experts))
        with torch.no_grad():
            for e, expert in enumerate(self.experts):
                expert.up.weight.copy_(layer.experts.w_up_EFD[e])
                expert.down.weight.copy_(layer.experts.w_down_EDF[e])
                if expert.gate is not None:
                    expert.gate.weight.copy_(layer.experts.w_gate_EFD[e])

    def forward(self, x_ND):
        weights_NK, ids_NK = self.router(x_ND).softmax(-1).topk(self.shape.top_k)
        weights_NK = weights_NK / weights_NK.sum(-1, keepdim=True)
        y_ND = torch.zeros_like(x_ND)
        for e, expert in enumerate(self.experts):
            token_R, choice_R = torch.where(ids_NK == e)
            if len(token_R):
                y_ND.index_add_(0, token_R, expert(x_ND[token_R]) * weights_NK[token_R, choice_R, None])
        return y_ND


class _Transformers(nn.Module):
    """transformers' own router and experts: Mixtral's for SwiGLU, Nemotron-H's (no gate matrix) for GELU."""

    def __init__(self, layer: MoELayer, shape: Shape, implementation: str):
        super().__init__()
        from transformers import MixtralConfig, NemotronHConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts, MixtralTopKRouter
        from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

        mixtral = MixtralConfig(
            hidden_size=shape.d, intermediate_size=shape.f, num_local_experts=shape.experts,
            num_experts_per_tok=shape.top_k,
        )  # fmt: skip
        self.router = MixtralTopKRouter(mixtral)
        self.router.weight = layer.router.weight
        up_EFD, down_EDF, gate_EFD = layer.experts.w_up_EFD, layer.experts.w_down_EDF, layer.experts.w_gate_EFD
        nemotron = NemotronHConfig(
            hidden_size=shape.d, moe_intermediate_size=shape.f, n_routed_experts=shape.experts, mlp_hidden_act="gelu",
            moe_latent_size=None,
        )  # fmt: skip
        mixtral._experts_implementation = nemotron._experts_implementation = implementation
        if shape.activation == "swiglu":
            self.experts = MixtralExperts(mixtral)
            self.experts.gate_up_proj = nn.Parameter(torch.cat([gate_EFD.detach(), up_EFD.detach()], dim=1))
        else:
            self.experts = NemotronHExperts(nemotron)
            self.experts.up_proj = nn.Parameter(up_EFD.detach().clone())
        self.experts.down_proj = nn.Parameter(down_EDF.detach().clone())

    def forward(self, x_ND):
        _, weights_NK, ids_NK = self.router(x_ND)
        return self.experts(x_ND, ids_NK, weights_NK)


def candidates(shape: Shape, device: str) -> dict[str, nn.Module]:
    """Every implementation of the layer with the same weights; RuntimeError if one computes something else."""
    layer = MoELayer(shape.model)
    for weight in (layer.experts.w_up_EFD, layer.experts.w_down_EDF, layer.experts.w_gate_EFD):
        if weight is not None:
            nn.init.normal_(weight, std=0.02)
    layers = {OURS: Output(layer), DEFINITION: _Definition(layer), INDEX_ADD: _Tutorial(layer, shape)}
    for name in (GROUPED, EAGER, BATCHED):
        layers[name] = _Transformers(layer, shape, name.split()[1])
    layers = {name: module.to(device) for name, module in layers.items()}
    x_ND = torch.randn(8, shape.d, device=device)
    with torch.no_grad():
        expected_ND = layers[DEFINITION](x_ND)
        for name, module in layers.items():
            difference = float((module(x_ND) - expected_ND).abs().max())
            if not difference <= 1e-4 * float(expected_ND.abs().max()):
                raise RuntimeError(f"{name} does not compute the same layer: its output differs by {difference:.1e}")
    return layers


def products(shape: Shape, device: str):
    """A function that does the matrix products of a forward and backward pass, by the faster way, nothing else."""
    rows, matrices = shape.tokens * shape.top_k, []
    up, down = (shape.d, shape.f), (shape.f, shape.d)
    for i, o in (up, up, down) if shape.activation == "swiglu" else (up, down):
        x, y, w = (torch.randn(size, device=device) for size in ((rows, i), (rows, o), (o, i)))
        matrices.append((x, y, w, torch.empty_like(x), torch.empty_like(y), torch.empty_like(w)))
    by_onednn = fits(x, w) and ONEDNN.taken()

    @torch.no_grad()
    def run():
        for x, y, w, dx, out, dw in matrices:
            if by_onednn:
                product(x, w), product(y, w.t()), product(y.t(), x.t())
                continue
            torch.mm(x, w.t(), out=out)
            torch.mm(y, w, out=dx)
            torch.mm(y.t(), x, out=dw)

    return run
