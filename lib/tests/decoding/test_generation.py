"""Generation: the same tokens as transformers' generate() and with every way of computing them, greedy and sampled."""

import sys
from collections import Counter

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.utils.flop_counter import FlopCounterMode

from upcycling import kernels
from upcycling.core.config import ModelConfig, MoEConfig
from upcycling.core.model import DecoderLM
from upcycling.core.routers import ROUTERS, TopP
from upcycling.decoding import decode
from upcycling.decoding.decode import Decoder, can_decode
from upcycling.decoding.generation import generate
from upcycling.hf.decoder_lm import to_hf
from upcycling.kernels import choice
from upcycling.kernels.few_rows import ONE_ROW
from upcycling.routing.intervention import intervene

SIZES = dict(vocab_size=29, d_model=16, n_layers=2, n_heads=4, d_ff=24, seq_len=24)
MOE = MoEConfig(num_experts=4, top_k=2, router_std=1.0)
VARIANTS = {
    "simple": ModelConfig.simple(**SIZES),
    "no positions": ModelConfig.simple(**SIZES, position="none"),
    "smol, 2 kv heads": ModelConfig.smol(**SIZES, n_kv_heads=2),
    "nano": ModelConfig.nano(**SIZES),
    "simple moe": ModelConfig.simple(**SIZES, moe=MOE),
    "smol moe": ModelConfig.smol(**SIZES, n_kv_heads=1, moe=MOE),
    "nano moe": ModelConfig.nano(**SIZES, moe=MoEConfig(num_experts=4, top_k=2, noisy=True)),
}


@pytest.fixture(scope="module", autouse=True)
def _kernels_on():
    """The decoder of one text is tested also where UPCYCLING_KERNELS=0 keeps it from being taken."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (choice, decode, kernels):
            patch.setattr(module, "ON", True)
        yield


def test_the_switch_takes_the_decoder_away(monkeypatch):
    model = make_model()
    assert can_decode(model)
    monkeypatch.setattr(decode, "ON", False)
    assert not can_decode(model)


def make_model(config=VARIANTS["simple"], std=0.4):
    torch.manual_seed(0)
    model = DecoderLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=std)
    return model


class Counting(torch.nn.Module):
    """Stands in for a model: after token t comes t + 1; keeps the widths of the inputs it was given."""

    def __init__(self, vocab_size=12, seq_len=20):
        super().__init__()
        self.config, self.widths = ModelConfig.simple(**SIZES | dict(vocab_size=vocab_size, seq_len=seq_len)), []

    def forward(self, tokens_BT, cache=None):
        self.widths.append(tokens_BT.shape[1])
        following = torch.nn.functional.one_hot((tokens_BT + 1) % self.config.vocab_size, self.config.vocab_size)
        return type("Output", (), {"logits_BTV": following.float()})

    def new_cache(self, batch_size):
        return "a cache"

    def parameters(self):
        return iter([torch.zeros(1)])


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_the_cache_changes_no_token(config):
    model, prompt_BT = make_model(config), torch.randint(29, (3, 5))
    cached = generate(model, prompt_BT, 19)
    assert cached.shape == (3, 24)
    assert torch.equal(cached[:, :5], prompt_BT)
    assert torch.equal(cached, generate(model, prompt_BT, 19, use_cache=False))
    best_BT = model(cached).logits_BTV.argmax(-1)
    assert torch.equal(cached[:, 5:], best_BT[:, 4:-1]), "each token is the most probable after those before it"
    assert len(cached[:, 5:].unique()) > 1, "a text of one token would prove little"


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("prompt", [[7], [3, 1, 4, 1, 5]], ids=["1 token", "5 tokens"])
def test_one_text_is_that_of_the_whole_model(config, prompt):
    """A batch of one goes another way."""
    model = make_model(config)
    assert can_decode(model)
    text_BT = generate(model, torch.tensor([prompt]), 19)
    assert torch.equal(text_BT, generate(model, torch.tensor([prompt]), 19, use_cache=False))
    assert torch.equal(text_BT, generate(model, torch.tensor([prompt] * 2), 19)[:1])
    assert len(text_BT[0, len(prompt) :].unique()) > 1, "a text of one token would prove little"


def test_with_the_cache_each_step_computes_one_token():
    model, prompt_BT = Counting(), torch.tensor([[1, 2, 3]])
    assert generate(model, prompt_BT, 4).tolist() == [[1, 2, 3, 4, 5, 6, 7]]
    assert model.widths == [3, 1, 1, 1]
    model.widths.clear()
    assert generate(model, prompt_BT, 4, use_cache=False).tolist() == [[1, 2, 3, 4, 5, 6, 7]]
    assert model.widths == [3, 4, 5, 6]


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_finished_text_is_filled_and_decoding_stops_when_all_are(use_cache):
    model, prompt_BT = Counting(), torch.tensor([[3, 4], [6, 7], [0, 1]])
    tokens_BT = generate(model, prompt_BT, 9, eos_id=8, use_cache=use_cache)
    assert tokens_BT.tolist() == [
        [3, 4, 5, 6, 7, 8, 8, 8, 8],
        [6, 7, 8, 8, 8, 8, 8, 8, 8],
        [0, 1, 2, 3, 4, 5, 6, 7, 8],
    ]
    assert len(model.widths) == 7, "two of the nine steps were not needed"


def test_an_end_in_the_prompt_ends_nothing():
    assert generate(Counting(), torch.tensor([[8, 2]]), 3, eos_id=8).tolist() == [[8, 2, 3, 4, 5]]


def test_the_models_mode_is_left_as_it_was():
    for training in (True, False):
        model = make_model().train(training)
        generate(model, torch.zeros(1, 2, dtype=torch.long), 3)
        assert model.training == training
    noisy = make_model(VARIANTS["nano moe"]).train()
    prompt_BT = torch.randint(29, (3, 5))
    assert torch.equal(generate(noisy, prompt_BT, 10), generate(noisy.eval(), prompt_BT, 10)), "no noise in decoding"
    model = make_model().train()
    with pytest.raises(ValueError, match="outside the vocabulary"):
        generate(model, torch.tensor([[29]]), 3)
    assert model.training


def test_prompts_that_do_not_fit():
    model = make_model()
    with pytest.raises(
        ValueError, match="5 prompt tokens and 20 new ones do not fit the model's context of 24; ask for at most 19"
    ):
        generate(model, torch.zeros(1, 5, dtype=torch.long), 20)
    for shape in ((1, 0), (5,)):
        with pytest.raises(ValueError, match="at least one token"):
            generate(model, torch.zeros(shape, dtype=torch.long), 3)
    assert generate(model, torch.zeros(2, 5, dtype=torch.long), 0).shape == (2, 5)


# ------------------------------------------------------------------------------------------ one token without modules

MOES = {router: MoEConfig(num_experts=4, top_k=2, router_std=1.0, router=router) for router in ROUTERS}
MOES |= {
    "shared": MoEConfig(num_experts=4, top_k=2, router_std=1.0, shared_experts=2),
    "narrow, not renormalised": MoEConfig(num_experts=4, top_k=2, expert_d_ff=12, renormalize=False, router_bias=True),
    "capacity, standardised": MoEConfig(num_experts=4, top_k=2, capacity_factor=0.5, logit_norm=2.0),
}
DECODED = VARIANTS | {
    "gelu_tanh, some layers": ModelConfig.simple(
        **SIZES, activation="gelu_tanh", moe=MoEConfig(num_experts=4, top_k=2, layers=(1,))
    ),
    "swiglu with biases": ModelConfig.simple(**SIZES, activation="swiglu", position="rope", moe=MOE),
} | {name: ModelConfig.smol(**SIZES, n_kv_heads=2, moe=moe) for name, moe in MOES.items()}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("config", DECODED.values(), ids=DECODED.keys())
@torch.no_grad()
def test_decoder_has_the_logits_of_the_model(config, dtype):
    model = make_model(config).to(dtype)
    tokens_BT = torch.randint(29, (1, 24))
    assert can_decode(model)
    ours, theirs = model.new_cache(1), model.new_cache(1)
    model(tokens_BT[:, :3], cache=ours)
    model(tokens_BT[:, :3], cache=theirs)
    decoder = Decoder(model, ours)
    for position in range(3, 24):
        logits_BV = decoder.step(int(tokens_BT[0, position]))
        expected_BV = model(tokens_BT[:, position : position + 1], cache=theirs).logits_BTV[:, -1]
        tolerance = dict(rtol=1e-4, atol=1e-4) if dtype == torch.float32 else dict(rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(logits_BV, expected_BV, **tolerance)
    assert ours.length == theirs.length == 24
    torch.testing.assert_close(ours.keys, theirs.keys, rtol=1e-3, atol=1e-3)


def test_decoder_follows_the_weights():
    model, prompt_BT = make_model(VARIANTS["smol moe"]), torch.tensor([[1, 2, 3]])
    before_BT = generate(model, prompt_BT, 12)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-0.7)
    assert not torch.equal(generate(model, prompt_BT, 12), before_BT)
    assert torch.equal(generate(model, prompt_BT, 12), generate(model, prompt_BT, 12, use_cache=False))


def test_an_intervention_is_heard():
    model, prompt_BT = make_model(VARIANTS["smol moe"]), torch.tensor([[1, 2, 3]])
    plain_BT = generate(model, prompt_BT, 12)
    for change in (dict(remove=[0, 1]), dict(top_k=1), dict(remove=[0, 1], temperature=3.0)):
        with intervene(model, **change):
            assert can_decode(model)
            text_BT = generate(model, prompt_BT, 12)
            assert torch.equal(text_BT, generate(model, prompt_BT, 12, use_cache=False))
        assert not torch.equal(text_BT, plain_BT), change
    assert torch.equal(generate(model, prompt_BT, 12), plain_BT)


def test_experts_that_are_not_chosen_are_not_computed():
    model = make_model(ModelConfig.smol(**SIZES, moe=MoEConfig(num_experts=4, top_k=2, router=TopP(threshold=1.0))))
    prompt_BT = torch.tensor([[1, 2, 3]])
    with intervene(model, remove=[0]):
        expected_BT = generate(model, prompt_BT, 12)
        for block in model.blocks:
            block.ffn.experts.w_up_EFD.data[0] = torch.nan
        assert can_decode(model) and torch.equal(generate(model, prompt_BT, 12), expected_BT)


@pytest.mark.parametrize("numpy", [True, False])
def test_whoever_watches_or_changes_a_module_sees_every_token(numpy, monkeypatch):
    monkeypatch.setitem(choice._taken, ONE_ROW.name, numpy)
    model, prompt_BT = make_model(VARIANTS["smol moe"]), torch.tensor([[1, 2, 3]])
    plain_BT, calls = generate(model, prompt_BT, 12), []
    hook = model.blocks[0].attention.q.register_forward_hook(lambda module, inputs, output: calls.append(1))
    assert torch.equal(generate(model, prompt_BT, 12), plain_BT) and len(calls) == 12
    hook.remove()
    counter = FlopCounterMode(display=False)
    with counter:
        generate(model, prompt_BT, 2)
    two = counter.get_total_flops()
    with counter:
        generate(model, prompt_BT, 12)
    assert counter.get_total_flops() > 2 * two
    with FlopCounterMode(display=False) as by_modules:
        hook = model.blocks[0].attention.q.register_forward_hook(lambda module, inputs, output: None)
        generate(model, prompt_BT, 12)
        hook.remove()
    assert counter.get_total_flops() == by_modules.get_total_flops(), "the same products, whichever way"
    assert can_decode(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert not can_decode(model)
    assert not can_decode(make_model().to(torch.bfloat16))
    assert not can_decode(torch.compile(make_model())) and not can_decode(Counting())
    replaced = make_model()
    replaced.blocks[0].ffn.up = torch.nn.Sequential(replaced.blocks[0].ffn.up)
    assert not can_decode(replaced)
    patched = make_model()
    patched.norm.forward = lambda x: x
    assert not can_decode(patched)


def test_bfloat16_generates():
    model, prompt_BT = make_model(VARIANTS["smol moe"]).to(torch.bfloat16), torch.tensor([[1, 2, 3]])
    text_BT = generate(model, prompt_BT, 9)
    assert torch.equal(text_BT, generate(model, prompt_BT.expand(2, -1), 9)[:1])
    assert generate(model, prompt_BT, 9, temperature=1.0, top_p=0.9, repetition_penalty=1.2).shape == (1, 12)


# ------------------------------------------------------------------------------------------------ beside transformers

EXPORTED = {name: VARIANTS[name] for name in ("simple", "smol, 2 kv heads", "smol moe")}
SAMPLING = [
    dict(temperature=0.7),
    dict(top_k=5),
    dict(top_p=0.6),
    dict(temperature=1.3, top_k=20, top_p=0.9, repetition_penalty=1.5),
    dict(repetition_penalty=1.8),
]


def theirs(exported, prompt_BT, new, mask_BT=None, **options):
    """transformers' own text, without the defaults that its configuration adds."""
    mask_BT = torch.ones_like(prompt_BT) if mask_BT is None else mask_BT
    options = dict(top_k=0, output_router_logits=False) | options
    if not hasattr(exported.config, "output_router_logits"):
        options.pop("output_router_logits")
    return exported.generate(prompt_BT, attention_mask=mask_BT, max_new_tokens=new, pad_token_id=0, **options)


@pytest.mark.parametrize("config", EXPORTED.values(), ids=EXPORTED.keys())
def test_greedy_is_transformers_greedy(config):
    model = make_model(config)
    exported = to_hf(model)
    prompts = [[1, 2, 3, 4, 5], [9], [17, 3, 28]]
    for prompt in prompts:
        prompt_BT = torch.tensor([prompt])
        expected_BT = theirs(exported, prompt_BT, 24 - len(prompt), do_sample=False)
        assert torch.equal(generate(model, prompt_BT, 24 - len(prompt)), expected_BT)
    # they pad on the left; we do not pad
    padded_BT = torch.tensor([[0] * (5 - len(prompt)) + prompt for prompt in prompts])
    mask_BT = torch.tensor([[0] * (5 - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    expected_BT = theirs(exported, padded_BT, 15, mask_BT, do_sample=False)
    for text, row_T, prompt in zip(generate(model, prompts, 15), expected_BT, prompts, strict=True):
        assert text.tolist() == row_T[5 - len(prompt) :].tolist()


@pytest.mark.parametrize("options", SAMPLING, ids=lambda options: ", ".join(options))
@pytest.mark.parametrize("config", EXPORTED.values(), ids=EXPORTED.keys())
def test_samples_are_transformers_samples(config, options):
    """Equal settings and an equally seeded generator: equal tokens."""
    model, prompt_BT = make_model(config, std=0.2), torch.tensor([[1, 2, 3], [4, 5, 6]])
    exported = to_hf(model)
    drawn = options.keys() != {"repetition_penalty"}
    for batch_BT in (prompt_BT, prompt_BT[:1]):
        with torch.random.fork_rng():
            torch.manual_seed(7)
            expected_BT = theirs(exported, batch_BT, 20, do_sample=drawn, **options)
        assert torch.equal(generate(model, batch_BT, 20, seed=7, **options), expected_BT)
        assert not torch.equal(expected_BT, generate(model, batch_BT, 20)), "the setting would change nothing"


def test_greedy_and_plain_sampling_need_no_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)  # importing it raises
    model, prompt_BT = make_model(), torch.tensor([[1, 2]])
    generate(model, prompt_BT, 3)
    generate(model, prompt_BT, 3, temperature=1.0)
    with pytest.raises(ImportError):
        generate(model, prompt_BT, 3, temperature=0.5)


# --------------------------------------------------------------------------------------------------- what is drawn


class Constant(Counting):
    """Stands in for a model that always has the same logits."""

    def __init__(self, logits_V):
        super().__init__(vocab_size=len(logits_V))
        self.logits_V = torch.tensor(logits_V)

    def forward(self, tokens_BT, cache=None):
        return type("Output", (), {"logits_BTV": self.logits_V.expand(*tokens_BT.shape, -1)})


def shares(probabilities, **options):
    """How often each token was drawn in 4,000 samples of a model with these probabilities."""
    model = Constant(torch.tensor(probabilities).log().tolist())
    drawn_BT = generate(model, torch.tensor([[0]]), 1, num_samples=4_000, **options)
    counts = Counter(drawn_BT[:, 1].tolist())
    return [counts[token] / 4_000 for token in range(len(probabilities))]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (dict(temperature=1.0), [0.5, 0.3, 0.15, 0.05]),
        (dict(top_k=2), [0.625, 0.375, 0, 0]),
        (dict(top_p=0.7), [0.625, 0.375, 0, 0]),  # 0.5 is too little, 0.8 is enough
        (dict(top_p=1.0), [0.5, 0.3, 0.15, 0.05]),
        (dict(temperature=0.5), [0.6849, 0.2466, 0.0616, 0.0068]),  # squared, over 0.365
        (dict(temperature=2.0, top_k=3), [0.4306, 0.3335, 0.2359, 0]),  # square roots of the best three, over 1.642
        (dict(temperature=0.5, top_p=0.7), [0.7353, 0.2647, 0, 0]),  # tempered before it is cut
        (dict(temperature=1.0, repetition_penalty=2.0), [0.25 / 0.75, 0.3 / 0.75, 0.15 / 0.75, 0.05 / 0.75]),
    ],
    ids=str,
)
def test_distribution_by_hand(options, expected):
    """Token 0 stands in the prompt: its log-probability, below 0, is multiplied by the penalty."""
    for share, wanted in zip(shares([0.5, 0.3, 0.15, 0.05], **options), expected, strict=True):
        assert share == pytest.approx(wanted, abs=0.03 if wanted else 0)  # four standard errors and more


def test_a_seed_repeats_and_the_global_state_stays():
    model, prompt_BT = make_model(std=0.1), torch.tensor([[1, 2, 3]])
    state = torch.random.get_rng_state()

    def draw(seed):
        return generate(model, prompt_BT, 15, temperature=1.0, num_samples=3, seed=seed)

    first_BT, again_BT, other_BT = draw(3), draw(3), draw(4)
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(first_BT, again_BT) and not torch.equal(first_BT, other_BT)
    torch.manual_seed(99)
    assert torch.equal(draw(3), first_BT)


def test_samples_of_a_prompt_stand_together():
    model = make_model(std=0.1)
    tokens_BT = generate(model, torch.tensor([[1, 2], [3, 4]]), 12, temperature=1.0, num_samples=3)
    assert tokens_BT[:, :2].tolist() == [[1, 2]] * 3 + [[3, 4]] * 3
    assert len({tuple(row) for row in tokens_BT.tolist()}) == 6
    texts = generate(model, [[1], [3, 4]], 5, temperature=1.0, num_samples=2)
    assert [(text.tolist()[: n], len(text)) for text, n in zip(texts, (1, 1, 2, 2), strict=True)] == [
        ([1], 6), ([1], 6), ([3, 4], 7), ([3, 4], 7)
    ]  # fmt: skip


# --------------------------------------------------------------------------------------------- prompts of all lengths


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
@settings(max_examples=5, deadline=None, derandomize=True)
@given(data=st.data())
def test_each_prompt_as_if_alone(config, data):
    model = make_model(config)
    ids = st.lists(st.integers(0, 28), min_size=1, max_size=14)
    prompts = data.draw(st.lists(ids, min_size=1, max_size=4))
    new, stops = data.draw(st.integers(0, 10)), data.draw(st.sets(st.integers(0, 28), max_size=6))
    texts = generate(model, prompts, new, eos_id=stops)
    for prompt, text in zip(prompts, texts, strict=True):
        (alone,) = generate(model, [torch.tensor(prompt)], new, eos_id=stops, use_cache=False)
        assert text.tolist() == alone.tolist()
        assert text[: len(prompt)].tolist() == prompt
        continuation = text[len(prompt) :].tolist()
        assert len(continuation) == new or continuation[-1] in stops
        assert not stops & set(continuation[:-1])


def test_all_rows_stand_at_the_same_position():
    model = Counting()
    texts = generate(model, [[1], [4, 5, 6, 7, 8, 9]], 3)
    assert [text.tolist() for text in texts] == [[1, 2, 3, 4], [4, 5, 6, 7, 8, 9, 10, 11, 0]]
    assert model.widths == [1] * 8, "from the end of the shortest prompt, one token at a time"


def test_any_of_several_ends():
    texts = generate(Counting(), [[3, 4], [6], [0, 1]], 9, eos_id=[8, 6])
    assert [text.tolist() for text in texts] == [[3, 4, 5, 6], [6, 7, 8], [0, 1, 2, 3, 4, 5, 6]]
    tokens_BT = generate(Counting(), torch.tensor([[3, 4], [6, 7]]), 9, eos_id=(8, 6))
    assert tokens_BT.tolist() == [[3, 4, 5, 6], [6, 7, 8, 8]], "filled with the token that ended it"


@pytest.mark.parametrize("use_cache", [True, False])
def test_streaming_gives_exactly_the_tokens(use_cache):
    prompts, steps = [[3, 4], [6], [0, 1, 2, 3]], []
    texts = generate(Counting(), prompts, 5, eos_id=8, on_tokens=steps.append, use_cache=use_cache)
    streamed = [[ids[row] for ids in steps if ids[row] is not None] for row in range(3)]
    assert streamed == [text.tolist()[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]
    assert steps[0] == [None, 7, None] and steps[1] == [5, 8, None] and steps[2] == [6, None, None]
    assert streamed == [[5, 6, 7, 8], [7, 8], [4, 5, 6, 7, 8]]
    model, steps = make_model(), []
    text_BT = generate(model, torch.tensor([[1, 2, 3]]), 9, on_tokens=steps.append)
    assert [[token] for token in text_BT[0, 3:].tolist()] == steps


def test_whoever_streams_may_break_off():
    model = make_model().train()

    def stop(ids):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(model, torch.tensor([[1]]), 5, on_tokens=stop)
    assert model.training


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(temperature=0), r"temperature=0 must be .* above 0; for the most probable tokens leave it out"),
        (dict(temperature=-1.0), "temperature=-1.0"),
        (dict(temperature=float("nan")), "temperature=nan"),
        (dict(top_k=0), "top_k=0 leaves no token to choose; give at least 1"),
        (dict(top_k=2.5), "top_k=2.5 is not a whole number"),
        (dict(top_p=0.0), r"top_p=0.0 .* choose 0 < top_p <= 1"),
        (dict(top_p=1.01), "top_p=1.01"),
        (dict(repetition_penalty=0), "repetition_penalty=0 must be above 0; 1 changes nothing"),
        (dict(num_samples=0, temperature=1.0), "num_samples=0 gives no text; choose at least 1"),
        (dict(num_samples=2), "num_samples=2 greedy texts would all be the same; give a temperature"),
        (dict(temperature=1.0, seed=1.5), "seed=1.5 is not a whole number"),
        (dict(eos_id=29), "token id 29 is outside the vocabulary of 29"),
        (dict(eos_id=[2, -1]), "token id -1 is outside"),
        (dict(prompt=[]), "the list of prompts is empty; give at least one"),
        (dict(prompt=torch.zeros(0, 3, dtype=torch.long)), "at least one token"),
        (dict(prompt=[[1], []]), r"prompt 1 has shape \(0,\)"),
        (dict(prompt=[1, 2]), r"prompt 0 has shape \(\); a list of prompts holds lists of ids"),
        (dict(prompt=[[1], [29]]), "token id 29 is outside the vocabulary of 29"),
        (dict(prompt=[[1], [-3, 5]]), "token id -3 is outside"),
        (dict(prompt=[[1.5]]), "prompt 0 holds torch.float32; give token ids"),
        (dict(new=-1), "max_new_tokens=-1 is negative"),
        (dict(new=2.0), "max_new_tokens=2.0 is not a whole number"),
        (dict(prompt=[[1], [1] * 20], new=5), "20 prompt tokens and 5 new ones .* context of 24; ask for at most 4"),
        (dict(prompt=[[1] * 24], new=5), "24 prompt tokens and 5 new ones .* context of 24; shorten the prompt"),
    ],
    ids=lambda value: ", ".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_done_is_named(options, said):
    prompt, new = options.pop("prompt", [[1, 2]]), options.pop("new", 3)
    with pytest.raises(ValueError, match=said):
        generate(make_model(), prompt, new, **options)
