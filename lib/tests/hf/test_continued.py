"""Continued pretraining: what is trained, by which loss, on which tokens, and what the report says about it."""

import copy
import math
import warnings

import numpy as np
import pytest
import torch
from real_models import TINY_LLAMA

transformers = pytest.importorskip("transformers")
from upcycling import DecoderLM, ModelConfig, MoEConfig, TokenStream, TrainConfig, upcycle, upcycle_pretrained  # noqa: E402
from upcycling.cli import main  # noqa: E402
from upcycling.hf import continued as module  # noqa: E402
from upcycling.hf.continued import continue_pretraining  # noqa: E402
from upcycling.routing.adapter import TransformersLM, block_size  # noqa: E402
from upcycling.routing.load import evaluate_routing, load_report  # noqa: E402
from upcycling.routing.metrics import balance_score  # noqa: E402
from upcycling.routing.record import record_routing  # noqa: E402
from upcycling.training import optim  # noqa: E402

V, E, T = 61, 4, 32
QUIET = dict(progress=False, verbose=False)
TINY = dict(
    vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=T, initializer_range=0.1, pad_token_id=None,
    bos_token_id=None, eos_token_id=None,
)  # fmt: skip


def make_stream(length, seed, vocab_size=V):
    steps = np.random.default_rng(seed).integers(1, 3, length)  # the next token is one or two further: ln 2 nats
    return TokenStream.from_ids(steps.cumsum() % V, vocab_size)


TRAIN, VALIDATION = make_stream(2000, 0), make_stream(500, 1)


def hf_moe(kind="llama", top_k=2, router_std=0.5, **changes):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **TINY | changes)
    dense = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    return upcycle_pretrained(dense, E, top_k, router_std=router_std, init="noise", noise=0.1)


def our_moe(seq_len=T, router_std=0.5, moe=None):
    torch.manual_seed(0)
    dense = DecoderLM(ModelConfig.smol(vocab_size=V, d_model=32, n_layers=2, n_heads=4, d_ff=48, seq_len=seq_len))
    return upcycle(dense, MoEConfig(**dict(num_experts=E, top_k=2, router_std=router_std) | (moe or {})), seed=0)


def make_config(**changes):
    return TrainConfig(**dict(steps=4, batch_size=4, learning_rate=1e-2, eval_every=0, weight_decay=0.0) | changes)


def run(model, config=None, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return continue_pretraining(model, TRAIN, VALIDATION, config or make_config(), **QUIET | options)


KINDS = pytest.mark.parametrize("make", [our_moe, hf_moe], ids=["ours", "transformers"])

# ------------------------------------------------------------------------------------------------ it trains


@KINDS
@pytest.mark.parametrize(
    "optimizer,schedule,rate",
    [("adafactor", "inverse_sqrt", 8e-2), ("adamw", "cosine", 1e-2)],
    ids=["adafactor", "adamw"],
)
def test_both_kinds_learn_under_both_recipes(make, optimizer, schedule, rate):
    model = make()
    config = make_config(
        steps=30, accumulation=2, optimizer=optimizer, schedule=schedule, learning_rate=rate, warmup_steps=5
    )
    result = run(model, config)
    assert result.before.cross_entropy > 4 and result.after.cross_entropy < 2.7
    assert result.training.final_loss == pytest.approx(result.after.cross_entropy, rel=1e-5)
    assert result.training.history[-1]["tokens"] == 30 * 2 * 4 * T and result.block == T
    assert not model.training


@KINDS
@pytest.mark.parametrize("parameters", ["all", "router", "experts"])
def test_exactly_the_chosen_parameters_change(make, parameters):
    model = make()
    before = copy.deepcopy(model.state_dict())
    result = run(model, parameters=parameters)
    changed = {name for name, _ in model.named_parameters() if not torch.equal(before[name], model.state_dict()[name])}
    routers = {name for name in before if name.endswith(("gate.weight", "router.weight"))}
    experts = {name for name in before if ".experts." in name}
    assert len(routers) == 2 and len(experts) in (4, 6)
    everything = {name for name, _ in model.named_parameters()}
    assert changed == {"all": everything, "router": routers, "experts": experts}[parameters]
    assert result.trained == sum(before[name].numel() for name in changed)
    assert all(weight.requires_grad for weight in model.parameters())


def test_the_noise_of_a_noisy_router_is_part_of_it_and_shared_experts_are_no_experts():
    model = our_moe(moe=dict(noisy=True, shared_experts=1))
    before = copy.deepcopy(model.state_dict())
    run(model, parameters="router")
    changed = {name.split(".")[3] for name in before if not torch.equal(before[name], model.state_dict()[name])}
    assert changed == {"router", "noise"}
    before = copy.deepcopy(model.state_dict())
    run(model, parameters="experts")
    changed = {name.split(".")[3] for name in before if not torch.equal(before[name], model.state_dict()[name])}
    assert changed == {"experts"}


def test_what_the_caller_froze_stays_frozen():
    model = hf_moe()
    embedding = model.get_input_embeddings().weight.requires_grad_(False)
    before = embedding.clone()
    run(model)
    assert torch.equal(embedding, before) and not embedding.requires_grad
    with pytest.raises(ValueError, match="nothing to train: all of parameters='router' is frozen"):
        for layer in model.model.layers:
            layer.mlp.gate.requires_grad_(False)
        run(model, parameters="router")


def test_a_run_resumes_where_it_stopped_and_not_with_another_balance_weight(tmp_path):
    straight, resumed = hf_moe(), hf_moe()
    expected = run(straight, make_config(steps=6, schedule="constant"))
    run(resumed, make_config(steps=3, schedule="constant"), directory=tmp_path)
    resumed = hf_moe()
    found = run(resumed, make_config(steps=6, schedule="constant"), directory=tmp_path)
    assert found.after.cross_entropy == expected.after.cross_entropy
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters()))
    for changes in (dict(aux_weight=0.5), dict(parameters="router")):
        with pytest.raises(ValueError, match="cannot be resumed from"):
            run(hf_moe(), make_config(steps=6, schedule="constant"), directory=tmp_path, **changes)


def test_a_selection_bias_moves_if_a_callback_moves_it():
    from upcycling.hf.selection_bias import SelectionBiasMover

    model = hf_moe("seed_oss")
    biases = [layer.mlp.gate.e_score_correction_bias for layer in model.model.layers]
    run(model)
    assert not any(bias_E.any() for bias_E in biases)

    class Move:
        def due(self, step):
            return True

        def __call__(self, step, wrapped, row):
            assert wrapped.model is model
            if step:
                mover.step()

    with SelectionBiasMover(model, rate=0.25) as mover:
        run(model, callbacks=[Move()])
    for bias_E in biases:
        assert bias_E.any() and torch.equal(bias_E * 4, (bias_E * 4).round())


def test_stacked_biases_are_not_decayed():
    experts = torch.nn.Module()
    for name, shape in {"down_proj": (E, 8, 8), "down_proj_bias": (E, 8), "b_up_EF": (E, 8), "norm": (8,)}.items():
        experts.register_parameter(name, torch.nn.Parameter(torch.ones(shape)))
    decayed, rest = optim.optimizer_of(experts, make_config(weight_decay=0.1), torch.device("cpu")).param_groups
    assert [weight.shape for weight in decayed["params"]] == [(E, 8, 8)] and decayed["weight_decay"] == 0.1
    assert len(rest["params"]) == 3 and rest["weight_decay"] == 0.0


def test_what_was_trained_loads_without_this_library(tmp_path):
    model = hf_moe()
    run(model, make_config(gradient_checkpointing=True, precision="bf16"))
    hooks = [hook for part in model.modules() for hook in part._forward_hooks.values()]
    assert not any(
        hook.__module__ == "upcycling.routing.adapter" for hook in hooks
    )  # transformers leaves some of its own
    assert not model.is_activation_checkpointing
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    ids_BT = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids_BT).logits, model(ids_BT).logits)


# ------------------------------------------------------------------------------------------------ the balance loss


def test_the_objective_adds_the_weighted_sum_over_layers():
    ours, theirs = our_moe(), hf_moe()
    for model in (ours, theirs):
        config = copy.deepcopy(model.config)
        row = run(model, make_config(steps=1), aux_weight=0.5).training.history[-1]
        assert row["aux_loss"] >= 0.99
        assert row["objective"] == pytest.approx(row["loss"] + 0.5 * 2 * row["aux_loss"], rel=1e-5)
        assert model.config.to_dict() == config.to_dict()
    for model, weight in ((ours, ours.config.moe.aux_weight), (theirs, 0.01)):
        row = run(model, make_config(steps=1)).training.history[-1]
        assert row["objective"] == pytest.approx(row["loss"] + weight * 2 * row["aux_loss"], rel=1e-5)


FAMILIES = {  # dense family -> what probability of an expert its balance loss sees
    "llama": lambda logits_NE: logits_NE.softmax(-1),  # Mixtral: softmax, then top-k
    "granite": lambda logits_NE: logits_NE.softmax(-1),  # GraniteMoe: top-k, then softmax
    "seed_oss": lambda logits_NE: logits_NE.sigmoid() / logits_NE.sigmoid().sum(-1, keepdim=True),  # Glm4Moe: sigmoid
}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "recomputed"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_the_balance_loss_is_each_layers_own_and_moves_its_router(kind, checkpointing):
    model = hf_moe(kind, attention_dropout=0.0)
    adapter = TransformersLM(model).train()
    adapter.gradient_checkpointing = checkpointing
    assert model.is_activation_checkpointing == checkpointing
    out = adapter(*next(VALIDATION.windows(4, T)))
    gradients = torch.autograd.grad(out.aux_losses_L.sum(), [r.module.weight for r in adapter.routers])
    assert all(gradient.norm() > 1e-4 for gradient in gradients)

    logits = []
    hooks = [
        router.module.register_forward_hook(lambda module, args, result: logits.append(result))
        for router in adapter.routers
    ]
    with torch.no_grad():
        model(next(VALIDATION.windows(4, T))[0])
    for hook in hooks:
        hook.remove()
    for layer, (logits_NE, _, expert_ids_NK) in enumerate(logits):
        probabilities_NE = FAMILIES[kind](logits_NE.float())
        load_E = expert_ids_NK.flatten().bincount(minlength=E) / expert_ids_NK.numel()
        expected = E * (load_E * probabilities_NE.mean(0)).sum()
        torch.testing.assert_close(out.aux_losses_L[layer].detach(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", FAMILIES)
def test_an_even_router_has_a_balance_loss_of_1(kind):
    adapter = TransformersLM(hf_moe(kind))
    with torch.no_grad():
        for router in adapter.routers:
            router.module.weight.zero_()  # every probability is 1/E, so the load does not matter
        out = adapter(*next(VALIDATION.windows(4, T)))
    torch.testing.assert_close(out.aux_losses_L, torch.ones(2))


def test_layers_that_collapse_on_different_experts_cost_each_its_own():
    adapter = TransformersLM(hf_moe())

    def send_all(router, first):
        def hook(module, args, output):
            logits_NE = torch.zeros_like(output[0])
            logits_NE[:, first : first + 2] = 50.0
            return router.rerouted(output, logits_NE)

        router.module.register_forward_hook(hook)

    for router, first in zip(adapter.routers, (0, 2)):
        send_all(router, first)
    with torch.no_grad():
        out = adapter(*next(VALIDATION.windows(4, T)))
    torch.testing.assert_close(out.aux_losses_L, torch.tensor([2.0, 2.0]))  # E / K; pooled, both would look even
    assert float(adapter.objective(out) - out.loss) == pytest.approx(0.01 * 4.0, rel=1e-4)


def test_a_router_that_the_loss_cannot_move_is_named():
    with pytest.warns(UserWarning, match=r"layers 0, 1: top-1 with renormalised weights"):
        continue_pretraining(hf_moe(top_k=1), TRAIN, VALIDATION, make_config(steps=1), **QUIET)
    copies = our_moe()
    with pytest.warns(UserWarning, match="the experts are identical.*With parameters='router'"):
        continue_pretraining(copies, TRAIN, VALIDATION, make_config(steps=1), parameters="router", **QUIET)
    tied = our_moe(router_std=0.0)
    with pytest.warns(UserWarning, match="all rows of the router are equal"):
        continue_pretraining(tied, TRAIN, VALIDATION, make_config(steps=1), **QUIET)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for model, parameters in ((copies, "all"), (hf_moe(top_k=1), "experts"), (hf_moe(), "router")):
            continue_pretraining(model, TRAIN, VALIDATION, make_config(steps=1), parameters=parameters, **QUIET)


# ------------------------------------------------------------------------------------------------ the report


@pytest.mark.parametrize("kind", ["llama", "seed_oss"])
def test_the_report_rests_on_the_whole_validation_set(kind):
    model = hf_moe(kind)
    found = evaluate_routing(model.train(), VALIDATION, batch_size=3, beta=0.5)
    assert model.training
    model.eval()
    assert evaluate_routing(model, VALIDATION, batch_size=3).cross_entropy == found.cross_entropy  # no dropout
    assert not model.training
    tokens_BT, targets_BT = next(VALIDATION.windows(100, T))
    with torch.no_grad(), record_routing(model) as trace:
        log_p_NV = model(tokens_BT).logits.log_softmax(-1).flatten(0, 1)
    real_N = targets_BT.flatten() != -100
    losses_N = -log_p_NV[real_N].gather(1, targets_BT.flatten()[real_N][:, None])
    assert found.load.num_tokens == len(VALIDATION) - 1 == real_N.sum() < real_N.numel()
    assert found.cross_entropy == pytest.approx(float(losses_N.mean()), rel=1e-5)
    load_LE = load_report(trace.select(real_N)).load_LE
    torch.testing.assert_close(found.load.load_LE, load_LE)
    balance_L = -(load_LE * load_LE.log()).sum(-1) / math.log(E)
    torch.testing.assert_close(found.balance_L, balance_L)
    expected = math.exp(float(losses_N.mean())) * math.exp(0.5 * (1 - float(balance_L.mean())))
    assert found.balanced_perplexity == pytest.approx(expected, rel=1e-5)


def test_a_load_counts_only_the_choices_that_were_kept():
    model = our_moe(moe=dict(capacity_factor=0.5), router_std=5.0)
    found = evaluate_routing(model, VALIDATION, batch_size=100)
    tokens_BT, targets_BT = next(VALIDATION.windows(100, T))
    with torch.no_grad():
        routings = model(tokens_BT).routings
    real_N = targets_BT.flatten() != -100
    for layer, routing in enumerate(routings):
        kept_NK = routing.kept_NK & real_N[:, None]
        assert not kept_NK[real_N].all()
        counts_E = routing.expert_ids_NK[kept_NK].bincount(minlength=E).double()
        torch.testing.assert_close(found.load.load_LE[layer], counts_E / counts_E.sum())


def test_the_report_says_before_and_after_in_one_table():
    result = run(hf_moe(), beta=2.0)
    rows = {row[""]: row for row in result.rows()}
    after = result.after
    expected = {
        "cross-entropy (nats)": after.cross_entropy,
        "balance B": float(balance_score(after.load.load_LE).mean()),
        "balanced perplexity": math.exp(after.cross_entropy + 2 * (1 - after.balance)),
        "layer 1: balance loss": float(after.aux_loss_L[1]),
        "layer 0: B": float(after.balance_L[0]),
    }
    for name, value in expected.items():
        assert rows[name]["after"] == f"{value:.4f}"
    assert rows["perplexity"]["before"] == f"{result.before.perplexity:.4f}"
    for text in (str(result), result._repr_html_()):
        assert "balanced perplexity" in text and "499 targets, beta 2" in text and "4 updates, 512 tokens" in text
    for text in (str(after), after._repr_html_()):
        assert "balance loss" in text and "pooled" in text and "beta 2" in text


# ------------------------------------------------------------------------------------------------ blocks and documents


def documents_stream(lengths):
    """Documents of these lengths; every token of the stream is another one."""
    count = sum(lengths)
    return TokenStream(np.arange(count, dtype="<u2"), np.array(lengths), count, "key")


def test_every_token_of_every_document_is_a_target_once_in_a_pass():
    lengths = [1, 700, 255, 256, 257, 3, 90]
    stream = documents_stream(lengths)
    targets = torch.cat([targets_BT.flatten() for _, targets_BT in stream.windows(2, 256)])
    seen = targets[targets != -100].bincount(minlength=sum(lengths))
    assert seen.tolist() == [0] + [1] * (sum(lengths) - 1)  # nothing comes before the very first token


def test_random_blocks_reach_every_token():
    stream = documents_stream([40, 7, 300])
    _, targets_BT = stream.random_windows(2000, 256, seed=0, step=0)
    assert (targets_BT.flatten().bincount(minlength=347) > 0).tolist() == [False] + [True] * 346


def test_the_block_is_256_or_the_context_if_that_is_shorter():
    assert block_size(our_moe(seq_len=300)) == 256 and block_size(our_moe(seq_len=40)) == 40
    assert block_size(hf_moe(max_position_embeddings=300)) == 256 and block_size(hf_moe()) == T
    for make, context in ((our_moe, dict(seq_len=300)), (hf_moe, dict(max_position_embeddings=300))):
        result = run(make(**context), make_config(steps=1, batch_size=2))
        assert result.block == 256 and result.training.history[-1]["tokens"] == 512
        result = run(make(**context), make_config(steps=1, batch_size=2), block=16)
        assert result.block == 16 and result.training.history[-1]["tokens"] == 32
        model = make(**context)
        found = run(model, make_config(steps=1, batch_size=2), block=16).after.cross_entropy
        assert found == pytest.approx(evaluate_routing(model, VALIDATION, seq_len=16).cross_entropy, rel=1e-6)
        assert found != pytest.approx(evaluate_routing(model, VALIDATION, seq_len=32).cross_entropy, rel=1e-6)


def test_documents_in_both_streams_are_refused():
    def stream(documents):
        return TokenStream(np.concatenate(documents).astype("<u2"), np.array([*map(len, documents)]), V, "key")

    rng = np.random.default_rng(0)
    documents = [rng.integers(0, V, 60) for _ in range(6)]
    with pytest.raises(ValueError, match="2 documents of the training stream are in the validation stream"):
        continue_pretraining(hf_moe(), stream(documents[:4]), stream(documents[2:]), make_config(), **QUIET)
    continue_pretraining(hf_moe(), stream(documents[:4]), stream(documents[4:]), make_config(steps=1), **QUIET)


# ------------------------------------------------------------------------------------------------ what is refused


def no_updates(*args, **options):
    raise AssertionError("it should have been refused before")


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(parameters="routers"), "parameters='routers' is unknown; choose one of 'all', 'router', 'experts'"),
        (dict(train_stream=make_stream(2000, 2, V + 1)), f"training stream has a vocabulary of {V + 1} tokens"),
        (dict(validation_stream=make_stream(2000, 2, V + 1)), f"validation stream has a vocabulary of {V + 1} tokens"),
        (dict(train_stream=make_stream(T, 2)), rf"the stream has {T} tokens, but .* {T + 1}"),
        (dict(block=T + 1), f"blocks of {T + 1} tokens do not fit the model's context; choose 1..{T}"),
        (dict(block=0), "blocks of 0 tokens"),
    ],
)
@KINDS
def test_what_does_not_fit_is_refused_before_training(make, change, message, monkeypatch):
    monkeypatch.setattr(module, "train", no_updates)
    given = dict(train_stream=TRAIN, validation_stream=VALIDATION, config=make_config()) | QUIET | change
    with pytest.raises(ValueError, match=message):
        continue_pretraining(make(), **given)


def test_models_that_cannot_be_continued_are_refused():
    dense = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY))
    with pytest.raises(ValueError, match=r"no MoE layer; upcycle it first, for instance with .*upcycle_pretrained"):
        run(dense)
    with pytest.raises(ValueError, match=r"no MoE layer; upcycle it first, for instance with .*upcycle$"):
        run(DecoderLM(ModelConfig.smol(vocab_size=V, d_model=32, n_layers=1, n_heads=4, d_ff=48, seq_len=T)))
    with pytest.raises(ValueError, match="has no language-model head; load it with AutoModelForCausalLM"):
        run(hf_moe().model)
    with pytest.raises(ValueError, match=r"torch.bfloat16, in which small updates are rounded away: call model.float"):
        run(hf_moe().bfloat16())
    with pytest.raises(TypeError, match="a transformers model or a DecoderLM, not a Linear"):
        run(torch.nn.Linear(2, 2))


# ------------------------------------------------------------------------------------------------ from the command line


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Mixtral with a tokenizer, and a file of texts."""
    from upcycling import save_tokenizer, train_tokenizer

    path = tmp_path_factory.mktemp("folder")
    texts = [f"Number {i} comes after {i - 1} and before {i + 1}." for i in range(1, 200)]
    (path / "texts.txt").write_text("\n\n".join(texts), encoding="utf-8")
    tokenizer = train_tokenizer(texts, vocab_size=270)
    hf_moe(vocab_size=270).bfloat16().save_pretrained(path / "moe")
    save_tokenizer(tokenizer, path / "moe")
    return path


def command(folder, out, *more):
    return ["continue", str(folder / "moe"), str(out), "--corpus", str(folder / "texts.txt"), "--steps", "3", *more]


def test_the_command_trains_a_folder_into_another(folder, tmp_path, capsys):
    options = ["--optimizer", "adafactor", "--schedule", "inverse_sqrt", "--parameters", "router", "--batch-size", "2"]
    assert main(command(folder, tmp_path / "out", *options, "--learning-rate", "0.1", "--beta", "0.5")) == 0
    printed = capsys.readouterr().out
    assert "balanced perplexity" in printed and "trained router" in printed and "beta 0.5" in printed
    before, after = (
        transformers.AutoModelForCausalLM.from_pretrained(path) for path in (folder / "moe", tmp_path / "out")
    )
    assert after.dtype == torch.bfloat16
    old, new = before.state_dict(), after.state_dict()
    assert {name for name in old if not torch.equal(old[name], new[name])} == {
        f"model.layers.{layer}.mlp.gate.weight" for layer in range(2)
    }
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("Number 7")["input_ids"]


def test_the_command_says_in_a_sentence_what_is_wrong(folder, tmp_path, capsys):
    assert main(command(folder, folder / "moe")) == 1
    assert "is the model's own folder" in capsys.readouterr().err
    assert main(["continue", str(folder / "nothing"), str(tmp_path / "out"), "--steps", "3"]) == 1
    assert capsys.readouterr().err.startswith("error: ")
    assert main(command(folder, tmp_path / "out", "--block", "1000")) == 1
    assert "blocks of 1000 tokens do not fit" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ a real model


def test_a_real_pretrained_llama_goes_on_learning(tmp_path):
    from upcycling import load_corpus, load_tokenizer

    splits = load_corpus("worlds", documents=300)  # of all domains; it was pretrained on one
    tokenizer = load_tokenizer(TINY_LLAMA)
    train_stream, validation_stream = (
        TokenStream.build(splits[name], tokenizer, tmp_path, progress=False) for name in ("train", "validation")
    )
    model = upcycle_pretrained(TINY_LLAMA, 4, 2)
    config = TrainConfig(
        steps=20, batch_size=4, optimizer="adafactor", schedule="inverse_sqrt", warmup_steps=5, learning_rate=2e-3,
        eval_every=0,
    )  # fmt: skip
    result = continue_pretraining(model, train_stream, validation_stream, config, **QUIET)
    assert result.block == 256
    assert result.before.cross_entropy < math.log(512)
    assert result.after.cross_entropy < result.before.cross_entropy - 0.1
    assert result.after.balance > result.before.balance
