"""Text from a model: greedy or sampled, one prompt or many of different lengths, with a key/value cache.

    generate(model, torch.tensor([[1, 5, 9]]), 100)                                  # the most probable continuation
    generate(model, [[1, 5, 9], [1, 7]], 100, eos_id=2)                              # two prompts, as lists of ids
    generate(model, prompt_BT, 100, temperature=0.8, top_p=0.95, num_samples=4, seed=1)

All rows of a batch stand at the same position: decoding begins at the end of the shortest prompt, and where a longer
one still has tokens of its own, those are taken in place of the chosen ones (as Meta's first Llama code does it). So
there is no padding that attention, positions, routers or a repetition penalty would have to look away from; the price
is one step for each token that the longest prompt has more than the shortest. A batch of one on a CPU takes the
quicker way of `upcycling.decoding.decode`.

Shapes: B rows (prompts times samples), T tokens, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import whole_number
from ..core.model import DecoderLM, evaluating
from .decode import Decoder, can_decode


@torch.no_grad()
def generate(
    model: DecoderLM,
    prompt_BT: Tensor | Sequence[Sequence[int] | Tensor],
    max_new_tokens: int,
    *,
    eos_id: int | Sequence[int] | None = None,
    use_cache: bool = True,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float | None = None,
    num_samples: int = 1,
    seed: int = 0,
    on_tokens: Callable[[list[int | None]], object] | None = None,
) -> Tensor | list[Tensor]:
    """Each prompt and its continuation: (B, T + new) for a tensor of prompts, a list of 1-D tensors for a list.

    Greedy (the most probable token each time) unless `temperature`, `top_k` or `top_p` is given: then tokens are drawn
    from the softmax of logits / temperature, of which only the `top_k` most probable stay, and of these the fewest
    whose probabilities add up to `top_p`. A `repetition_penalty` above 1 makes tokens that the row has already, prompt
    included, less probable, and goes with both. All four are transformers' logits processors, in its order.
    `num_samples` rows are drawn for each prompt, those of a prompt next to each other. The same `seed` draws the same
    tokens; torch's global random state is neither used nor changed.

    A row that has produced `eos_id` (or one of several) is finished; decoding stops when all rows are. In a tensor, a
    finished row is filled up with the token that ended it; in a list, it ends with that token. `on_tokens` is called
    after each step with a list of B ids: each row's new token, or None where the row is finished or still reads its
    prompt.

    With `use_cache` a new token costs one token's forward pass; without, the whole sequence is computed again: the
    tokens are the same, but for rounding. Rules whose choices depend on the batch (expert choice, a `capacity_factor`)
    see the tokens of one step, finished rows included: what a row becomes then depends on the rows beside it, and a
    lone token is taken by every expert under expert choice, which is not the function that was trained.

    Raises ValueError for prompts that are empty, hold an id outside the vocabulary or do not fit the model's context
    together with the new tokens, and for settings out of range.
    """
    prompts = _checked_prompts(prompt_BT, model.config.vocab_size)
    max_new_tokens = _checked_room(prompts, max_new_tokens, model.config.seq_len)
    ends = _checked_ends(eos_id, model.config.vocab_size)
    device = prompt_BT.device if isinstance(prompt_BT, Tensor) else next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(whole_number("seed", seed))
    pick = _picker(temperature, top_k, top_p, repetition_penalty, num_samples, generator)
    rows = [prompt.tolist() for prompt in prompts for _ in range(num_samples)]
    ends_at = [len(prompt) + max_new_tokens for prompt in rows]  # or before, where a row produces one of `ends`
    tokens_BT = torch.zeros(len(rows), max(ends_at), dtype=torch.long, device=device)
    position = min(len(prompt) for prompt in rows)
    tokens_BT[:, :position] = torch.tensor([prompt[:position] for prompt in rows])
    with evaluating(model):
        logits_after = _with_cache(model, len(rows)) if use_cache else _without_cache(model)
        column = [0] * len(rows)
        while position < max(ends_at):
            seen_BT = tokens_BT[:, :position]
            new: list[int | None] = [None] * len(rows)
            for row, token in enumerate(pick(seen_BT, logits_after(seen_BT)).tolist()):
                if position < len(rows[row]):
                    column[row] = rows[row][position]
                elif position < ends_at[row]:
                    column[row] = new[row] = token
                    if token in ends:
                        ends_at[row] = position + 1
            tokens_BT[:, position] = torch.tensor(column)  # a row at its end is filled with the token that ended it
            position += 1
            if on_tokens is not None:
                on_tokens(new)
    if isinstance(prompt_BT, Tensor):
        return tokens_BT[:, : max(ends_at)]
    return [row_T[:end] for row_T, end in zip(tokens_BT, ends_at)]


def _without_cache(model) -> Callable[[Tensor], Tensor]:
    return lambda tokens_BT: model(tokens_BT).logits_BTV[:, -1]


def _with_cache(model, batch_size: int) -> Callable[[Tensor], Tensor]:
    """logits_BV after tokens_BT, which must begin with those of the call before."""
    cache, seen = model.new_cache(batch_size), 0
    decoder = Decoder(model, cache) if batch_size == 1 and can_decode(model) else None

    def logits_after(tokens_BT: Tensor) -> Tensor:
        nonlocal seen
        unseen_BT, seen = tokens_BT[:, seen:], tokens_BT.shape[1]
        if decoder is not None and unseen_BT.shape[1] == 1:
            return decoder.step(int(unseen_BT))
        return model(unseen_BT, cache=cache).logits_BTV[:, -1]

    return logits_after


def _picker(temperature, top_k, top_p, repetition_penalty, num_samples, generator) -> Callable:
    """The function that chooses next_B, given the tokens so far (B, T) and the logits after them (B, V)."""
    sampling = any(setting is not None for setting in (temperature, top_k, top_p))
    if whole_number("num_samples", num_samples) < 1:
        raise ValueError(f"num_samples={num_samples} gives no text; choose at least 1")
    if num_samples > 1 and not sampling:
        raise ValueError(
            f"num_samples={num_samples} greedy texts would all be the same; give a temperature (1.0 for the model's "
            "own probabilities)"
        )
    processors = _processors(temperature, top_k, top_p, repetition_penalty)

    def pick(tokens_BT: Tensor, logits_BV: Tensor) -> Tensor:
        if processors or sampling:
            logits_BV = logits_BV if logits_BV.dtype == torch.float64 else logits_BV.float()
        for processor in processors:
            logits_BV = processor(tokens_BT, logits_BV)
        if not sampling:
            return logits_BV.argmax(-1)
        return torch.multinomial(logits_BV.softmax(-1), 1, generator=generator)[:, 0]

    return pick


def _processors(temperature, top_k, top_p, repetition_penalty) -> list:
    """transformers' logits processors for these settings, in the order of its own generate()."""
    if temperature is not None and not 0 < temperature < float("inf"):
        raise ValueError(
            f"temperature={temperature!r} must be a finite number above 0; for the most probable tokens leave it out"
        )
    if top_k is not None and whole_number("top_k", top_k) < 1:
        raise ValueError(f"top_k={top_k} leaves no token to choose; give at least 1, or None for all")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p!r} is no share of the probability; choose 0 < top_p <= 1")
    if repetition_penalty is not None and not 0 < repetition_penalty < float("inf"):
        raise ValueError(f"repetition_penalty={repetition_penalty!r} must be above 0; 1 changes nothing")
    wanted: list[tuple[str, Any, int | None]] = [
        ("RepetitionPenaltyLogitsProcessor", repetition_penalty, 1),
        ("TemperatureLogitsWarper", temperature, 1),
        ("TopKLogitsWarper", top_k, None),
        ("TopPLogitsWarper", top_p, 1),
    ]
    active = [(name, value) for name, value, neutral in wanted if value is not None and value != neutral]
    if not active:
        return []
    import transformers

    # transformers asks for a float where a whole number would do
    return [getattr(transformers, name)(value if name[:4] == "TopK" else float(value)) for name, value in active]


def _checked_prompts(prompts, vocab_size: int) -> list[Tensor]:
    if isinstance(prompts, Tensor):
        if prompts.dim() != 2 or 0 in prompts.shape:
            raise ValueError(
                f"the prompt has shape {tuple(prompts.shape)}; give (batch, tokens) with at least one token"
            )
    elif not len(prompts):
        raise ValueError("the list of prompts is empty; give at least one")
    rows = []
    for number, prompt in enumerate(prompts):
        row_T = torch.as_tensor(prompt)
        if row_T.dim() != 1 or not len(row_T):
            raise ValueError(
                f"prompt {number} has shape {tuple(row_T.shape)}; a list of prompts holds lists of ids, each with at "
                "least one token"
            )
        if row_T.is_floating_point() or row_T.dtype == torch.bool:
            raise ValueError(f"prompt {number} holds {row_T.dtype}; give token ids, which are whole numbers")
        low, high = (int(value) for value in row_T.aminmax())
        _check_id(low if low < 0 else high, vocab_size)
        rows.append(row_T)
    return rows


def _check_id(token: int, vocab_size: int) -> None:
    if not 0 <= token < vocab_size:
        raise ValueError(
            f"token id {token} is outside the vocabulary of {vocab_size}; was the text tokenized with this model's "
            "tokenizer?"
        )


def _checked_room(prompts: list[Tensor], max_new_tokens: int, seq_len: int) -> int:
    if whole_number("max_new_tokens", max_new_tokens) < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens} is negative; ask for 0 or more")
    longest = max(len(prompt) for prompt in prompts)
    if longest + max_new_tokens > seq_len:
        remedy = f"ask for at most {seq_len - longest} new tokens" if longest < seq_len else "shorten the prompt"
        raise ValueError(
            f"{longest} prompt tokens and {max_new_tokens} new ones do not fit the model's context of {seq_len}; "
            + remedy
        )
    return int(max_new_tokens)


def _checked_ends(eos_id, vocab_size: int) -> set[int]:
    """The ids that end a text."""
    if eos_id is None:
        return set()
    single = not isinstance(eos_id, (list, tuple, set, frozenset))
    ends = {whole_number("eos_id", token) for token in ([eos_id] if single else eos_id)}
    for token in ends:
        _check_id(token, vocab_size)
    return ends
