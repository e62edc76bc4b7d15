"""Greedy text from one prompt, beside `generate()` of the exported model, and beside its floor.

Both continue the same prompt with the same weights, and the texts are compared before anything is timed. The floor is
what a token cannot do without: reading each active weight once, here by adding them up.
"""

from dataclasses import replace

import torch

from ..core.config import ModelConfig, MoEConfig
from ..core.model import DecoderLM
from ..decoding.generation import generate
from ..hf.decoder_lm import to_hf
from .measure import Bench, Comparison, compared

PROMPT, NEW = 8, 100
SHAPES = {  # name -> configuration, least speed against generate()
    "10M": (ModelConfig.smol(vocab_size=2048, d_model=384, n_layers=6, n_heads=6, d_ff=1024, seq_len=256), 2.0),
    "30M": (ModelConfig.smol(vocab_size=2048, d_model=512, n_layers=10, n_heads=8, d_ff=1376, seq_len=256), 1.6),
}
EXPERTS = MoEConfig(num_experts=8, top_k=2)
OURS, THEIRS, FLOOR = "generate", "transformers generate()", "reading the active weights"


def compare(bench: Bench) -> list[Comparison]:
    """Each shape dense and as an MoE; with `quick` the smaller shape alone."""
    results = []
    for name in list(SHAPES)[:1] if bench.quick else SHAPES:
        shape, goal = SHAPES[name]
        for config in (shape, replace(shape, moe=EXPERTS)):
            functions, megabytes = candidates(config, bench.device)
            seconds = bench.times(functions, rounds=max(3, bench.rounds // 2), warm_up=1)
            kind = f"MoE, {EXPERTS.num_experts} experts top-{EXPERTS.top_k}" if config.moe else "dense"
            setting = f"{name} {kind}, batch 1, {NEW} tokens after {PROMPT}, {megabytes:.0f} MB active"
            results += [
                compared("generation", setting, seconds, OURS, THEIRS, "speed", goal),
                compared("generation", setting, seconds, OURS, FLOOR),
            ]
    return results


def candidates(config: ModelConfig, device: str) -> tuple[dict, float]:
    """The functions to be timed, and the active weights in MB; RuntimeError if the two texts are not the same."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        # larger weights than a fresh model's, so that the text does not repeat one token
        model = DecoderLM(replace(config, init_std=0.06)).eval().to(device)
        prompt_BT = torch.randint(config.vocab_size, (1, PROMPT)).to(device)
    exported = to_hf(model)
    everything_BT = torch.ones_like(prompt_BT)

    def ours():
        return generate(model, prompt_BT, NEW)

    def theirs():
        return exported.generate(
            prompt_BT, attention_mask=everything_BT, do_sample=False, max_new_tokens=NEW, pad_token_id=0
        )

    if not torch.equal(ours(), theirs()):
        raise RuntimeError("generate and transformers' generate() gave different texts from the same weights")
    chosen = config.moe.top_k if config.moe else 0
    whole, experts = [], []
    for weight in dict.fromkeys(model.parameters()):
        (experts if weight.dim() == 3 else whole).append(weight.detach())
    elements = sum(weight.numel() for weight in whole) + sum(weight[:chosen].numel() for weight in experts)

    def floor():
        for token in range(NEW):
            for weight in whole:
                weight.sum()
            for weight in experts:  # others each time, as routing would choose
                first = token * chosen % (len(weight) - chosen + 1)
                weight[first : first + chosen].sum()

    return {OURS: ours, THEIRS: theirs, FLOOR: floor}, elements * whole[0].element_size() / 1e6
