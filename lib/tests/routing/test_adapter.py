"""What our models and transformers' have in common: a context, logits, ids spread over experts."""

import pytest
import torch

from upcycling.core.config import ModelConfig
from upcycling.core.model import DecoderLM
from upcycling.core.routing import by_expert, count_ids
from upcycling.routing.adapter import block_size, context_length, logits_of

transformers = pytest.importorskip("transformers")
SIZES = dict(vocab_size=20, d_model=8, n_layers=1, n_heads=2, d_ff=8)


def test_the_context_is_found_in_either_kind_of_configuration():
    ours = ModelConfig.simple(**SIZES, seq_len=12)
    theirs = transformers.LlamaConfig(max_position_embeddings=34)
    nested = transformers.Gemma3Config(text_config={"max_position_embeddings": 56})  # text inside a multimodal one
    assert [context_length(config) for config in (ours, theirs, nested)] == [12, 34, 56]
    assert context_length(transformers.GPT2Config(n_positions=78)) == 78, "another name for the same"
    assert context_length(transformers.MambaConfig()) == 2**31, "no limit"


def test_a_block_fits_the_context():
    model = DecoderLM(ModelConfig.simple(**SIZES, seq_len=12))
    assert block_size(model) == block_size(model, 12) == 12 and block_size(model, 5) == 5
    with pytest.raises(ValueError, match=r"blocks of 13 tokens do not fit the model's context; choose 1\.\.12"):
        block_size(model, 13)


def test_logits_of_either_kind_of_output():
    logits_BTV, model = torch.randn(1, 2, 20), DecoderLM(ModelConfig.simple(**SIZES, seq_len=12))
    assert logits_of(transformers.modeling_outputs.CausalLMOutput(logits=logits_BTV)) is logits_BTV
    tokens_BT = torch.tensor([[1, 2]])
    assert torch.equal(logits_of(model(tokens_BT)), model(tokens_BT).logits_BTV)


def test_values_are_spread_over_their_experts_with_their_gradient():
    ids_NK, values_NK = torch.tensor([[2, 0], [1, 3]]), torch.tensor([[0.5, 0.25], [1.0, 2.0]], requires_grad=True)
    spread_NE = by_expert(values_NK, ids_NK, 4)
    assert spread_NE.tolist() == [[0.25, 0.0, 0.5, 0.0], [0.0, 1.0, 0.0, 2.0]]
    (spread_NE * torch.arange(8.0).view(2, 4)).sum().backward()
    assert values_NK.grad.tolist() == [[2.0, 0.0], [5.0, 7.0]]
    assert (
        by_expert(torch.ones_like(ids_NK, dtype=torch.bool)[None], ids_NK[None], 4).tolist()[0][0] == [True, False] * 2
    )
    assert count_ids(ids_NK[None], 5).tolist() == [1, 1, 1, 1, 0]
