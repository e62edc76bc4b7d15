"""Greedy decoding: the cache changes no token, endings are respected, prompts that do not fit are refused."""

import pytest
import torch

from upcycling.config import ModelConfig, MoEConfig
from upcycling.generation import generate
from upcycling.model import DecoderLM

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


def make_model(config=VARIANTS["simple"], std=0.4):
    torch.manual_seed(0)
    model = DecoderLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=std)
    return model


class Counting:
    """Stands in for a model: after token t comes t + 1; keeps the widths of the inputs it was given."""

    def __init__(self, vocab_size=12, seq_len=20):
        self.config = ModelConfig.simple(**SIZES | dict(vocab_size=vocab_size, seq_len=seq_len))
        self.training, self.widths = False, []

    def __call__(self, tokens_BT, cache=None):
        self.widths.append(tokens_BT.shape[1])
        following = torch.nn.functional.one_hot((tokens_BT + 1) % self.config.vocab_size, self.config.vocab_size)
        return type("Output", (), {"logits_BTV": following.float()})

    def new_cache(self, batch_size):
        return "a cache"

    def eval(self):
        return self

    def train(self, mode):
        return self


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
