"""A training step (forward, loss, backward, clipping, AdamW) beside libraries' models of the same shape.

The peers hold the same weights and read the same tokens, with the same fused AdamW; the transformers models are what
`to_hf` exports, and that their loss is ours is checked before anything is timed. The floor is the time that the step's
matrix products would take at the speed of one large product, forward once and backward twice.
"""

import shutil
from dataclasses import replace
from itertools import cycle

import torch
import torch.nn.functional as F
from torch import nn

from ..core.config import ModelConfig, MoEConfig
from ..core.experts import linear
from ..core.model import DecoderLM
from ..cost.parts import forward_flops
from ..hf.decoder_lm import to_hf
from .measure import Bench, Comparison, compared

SHAPE = ModelConfig.smol(vocab_size=2048, d_model=384, n_layers=6, n_heads=6, d_ff=1024, seq_len=256)
MOE = replace(SHAPE, moe=MoEConfig(num_experts=8, top_k=2))
BATCH = 8
COMPILED = "ours, blocks compiled"
FLOOR = "its matrix products at the speed of a large one"


def compare(bench: Bench) -> list[Comparison]:
    """Tokens per second of a dense model and of an MoE with 8 experts, top-2, at 2,048 tokens a step."""
    rounds = max(3, bench.rounds // 3)
    return _dense(bench, rounds) + _moe(bench, rounds)


def _compiled(bench: Bench, model: DecoderLM) -> dict[str, DecoderLM]:
    """The model with its blocks compiled, where there is a C++ compiler and time for it."""
    if bench.quick or not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))):
        return {}
    twin = DecoderLM(model.config)
    twin.load_state_dict(model.state_dict())
    for block in twin.blocks:
        block.compile()
    return {COMPILED: twin}


def _dense(bench: Bench, rounds: int) -> list[Comparison]:
    ours = DecoderLM(SHAPE).to(bench.device)
    gpt = NanoGPT(SHAPE, d_ff=SHAPE.d_ff * 3 // 2).to(bench.device)  # two matrices of 1.5 times the width: equal FLOPs
    models = {"ours": ours, "transformers Llama": to_hf(ours), "nanoGPT-like": gpt} | _compiled(bench, ours)
    seconds = _times(bench, rounds, models)
    goals = {"transformers Llama": ("speed", 1.15), "nanoGPT-like": ("speed", 1.0), FLOOR: ()}
    return _lines(SHAPE, seconds, goals, {"ours": ("speed",)})


def _moe(bench: Bench, rounds: int) -> list[Comparison]:
    ours = DecoderLM(MOE).to(bench.device)
    names = {f"transformers Mixtral {name}": name for name in ("grouped_mm", "eager")}
    peers = {}
    for name, implementation in names.items():
        peers[name] = to_hf(ours)
        peers[name].set_experts_implementation(implementation)
        peers[name].config.output_router_logits = False  # their balance loss is another one: ours alone pays for it
    seconds = _times(bench, rounds, {"ours": ours} | peers | _compiled(bench, ours))
    goals = dict(zip(names, (("speed", 1.15), ("speed", 1.3)))) | {FLOOR: ()}
    return _lines(MOE, seconds, goals, dict(zip(names, (("speed", 1.25), ("speed", 1.4)))))


def _lines(config: ModelConfig, seconds, goals: dict[str, tuple], goals_compiled: dict[str, tuple]) -> list[Comparison]:
    whole, active = (DecoderLM(config).num_parameters(active) / 1e6 for active in (False, True))
    setting = f"training step, {whole:.1f}M parameters, {active:.1f}M active, {BATCH} x {config.seq_len} tokens"
    lines = [compared("step", setting, seconds, "ours", peer, *goal) for peer, goal in goals.items()]
    if COMPILED in seconds:
        lines += [compared("step", setting, seconds, COMPILED, peer, *goal) for peer, goal in goals_compiled.items()]
    return lines


def _times(bench: Bench, rounds: int, models: dict[str, nn.Module]) -> dict[str, list[float]]:
    config, generator = models["ours"].config, torch.Generator().manual_seed(0)
    batches = []  # a new one for each update: what the experts get changes, as it does in training
    for _ in range(20):
        ids_BT = torch.randint(config.vocab_size, (BATCH, config.seq_len + 1), generator=generator).to(bench.device)
        batches.append((ids_BT[:, :-1].contiguous(), ids_BT[:, 1:].contiguous()))

    def loss(model, tokens_BT, targets_BT):
        if isinstance(model, DecoderLM):
            return model.objective(model(tokens_BT, targets_BT))
        if isinstance(model, NanoGPT):
            return model(tokens_BT, targets_BT)
        return model(input_ids=tokens_BT, shift_labels=targets_BT, labels=targets_BT, use_cache=False).loss

    def step(model):
        optimizer, own = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True), cycle(batches)

        def update():
            loss(model, *next(own)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        return update

    models = {name: model.to(bench.device).train() for name, model in models.items()}
    expected = float(models["ours"](*batches[0]).loss.detach())
    for name, model in models.items():
        if name.startswith("transformers"):
            found = float(loss(model, *batches[0]).detach())
            if not abs(found - expected) < 1e-3:
                raise RuntimeError(f"{name} does not compute the same loss: {found:.4f}, not {expected:.4f}")
    functions = {name: step(model) for name, model in models.items()}
    functions[FLOOR] = _large_products(3 * BATCH * forward_flops(config, config.seq_len), bench.device)
    return bench.times(functions, rounds=rounds)


def _large_products(flops: int, device: str):
    """A function that multiplies 512-row matrices until `flops` are done."""
    x, w = torch.randn(512, 1024, device=device), torch.randn(1024, 1024, device=device)
    times = round(flops / (2 * 512 * 1024 * 1024))

    @torch.no_grad()
    def run():
        for _ in range(times):
            linear(x, w)

    return run


class NanoGPT(nn.Module):
    """GPT-2 as teaching code writes it: one matrix for q, k and v, LayerNorm, GELU, learned positions, tied head."""

    def __init__(self, config: ModelConfig, d_ff: int):
        super().__init__()
        d, self.heads = config.d_model, config.n_heads
        self.tokens, self.positions = nn.Embedding(config.vocab_size, d), nn.Embedding(config.seq_len, d)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                dict(
                    norm1=nn.LayerNorm(d, bias=False), qkv=nn.Linear(d, 3 * d, bias=False),
                    out=nn.Linear(d, d, bias=False), norm2=nn.LayerNorm(d, bias=False),
                    up=nn.Linear(d, d_ff, bias=False), down=nn.Linear(d_ff, d, bias=False),
                )
            )
            for _ in range(config.n_layers)
        )  # fmt: skip
        self.norm, self.head = nn.LayerNorm(d, bias=False), nn.Linear(d, config.vocab_size, bias=False)
        self.apply(lambda m: nn.init.normal_(m.weight, std=0.02) if isinstance(m, nn.Linear | nn.Embedding) else None)
        self.head.weight = self.tokens.weight

    def forward(self, tokens_BT, targets_BT):
        b, t = tokens_BT.shape
        x_BTD = self.tokens(tokens_BT) + self.positions(torch.arange(t, device=tokens_BT.device))
        for block in self.blocks:
            qkv = block["qkv"](block["norm1"](x_BTD)).split(x_BTD.shape[-1], dim=-1)
            q, k, v = (part.view(b, t, self.heads, -1).transpose(1, 2) for part in qkv)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, -1)
            x_BTD = x_BTD + block["out"](y)
            x_BTD = x_BTD + block["down"](F.gelu(block["up"](block["norm2"](x_BTD))))
        return F.cross_entropy(self.head(self.norm(x_BTD)).flatten(0, 1), targets_BT.flatten())
