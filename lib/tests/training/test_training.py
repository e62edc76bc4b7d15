"""The training loop against a loop written out by hand, its records, and what it refuses."""

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from upcycling.core.config import ModelConfig, MoEConfig
from upcycling.core.model import DecoderLM
from upcycling.text.stream import TokenStream
from upcycling.training import loop as training
from upcycling.training.checkpoint import load_model
from upcycling.training.config import TrainConfig
from upcycling.training.evaluation import evaluate
from upcycling.training.loop import train

LIBRARY = Path(training.__file__).parents[2]
VOCABULARY = 29
QUIET = dict(progress=False, verbose=False)


def make_stream(length=1000, seed=0, vocab_size=VOCABULARY):
    steps = np.random.default_rng(seed).integers(1, 3, length)  # the next token is one or two further: ln 2 nats
    return TokenStream.from_ids(steps.cumsum() % VOCABULARY, vocab_size)


def make_model(seed=0, **changes):
    sizes = dict(vocab_size=VOCABULARY, d_model=16, n_layers=1, n_heads=2, d_ff=16, seq_len=12)
    torch.manual_seed(seed)
    return DecoderLM(ModelConfig.simple(**(sizes | changes)))


def make_moe(**changes):
    return make_model(moe=MoEConfig(num_experts=4, top_k=2, aux_weight=0.5), **changes)


def make_config(**changes):
    return TrainConfig(**(dict(steps=8, batch_size=4, learning_rate=1e-2, eval_every=4, log_every=2) | changes))


def run(model, config=None, **changes):
    config = make_config(**changes) if config is None else config
    return train(model, make_stream(), make_stream(200, seed=1), config, **QUIET)


def distance(model, other):
    return max((a - b).abs().max().item() for a, b in zip(model.parameters(), other.parameters()))


# --------------------------------------------------------------------------------------------------------- the updates


def test_it_learns_what_can_be_learned():
    for optimizer, rate in (("adamw", 1e-2), ("adafactor", 1e-1)):
        model = make_moe()
        result = run(model, steps=150, batch_size=8, optimizer=optimizer, learning_rate=rate, eval_every=50)
        start = result.history[0]["val_loss"]
        assert start == pytest.approx(math.log(VOCABULARY), abs=0.1)
        assert math.log(2) - 0.05 < result.final_loss < 0.9, optimizer
        assert result.best_loss == min(row["val_loss"] for row in result.history if row["val_loss"] is not None)
        assert result.final_loss == evaluate(model, make_stream(200, seed=1)) == result.history[-1]["val_loss"]


def test_it_equals_a_loop_written_out():
    model, reference, stream = make_moe().double(), make_moe().double(), make_stream()
    config = make_config(accumulation=2, grad_clip=0.5, warmup_steps=2, weight_decay=0.3, log_every=1)
    result = run(model, config)

    decayed = {
        "token_embedding.weight", "position_embedding.weight", "blocks.0.attention.q.weight",
        "blocks.0.attention.k.weight", "blocks.0.attention.v.weight", "blocks.0.attention.out.weight",
        "blocks.0.ffn.router.weight", "blocks.0.ffn.experts.w_up_EFD", "blocks.0.ffn.experts.w_down_EDF",
    }  # fmt: skip
    named = dict(reference.named_parameters())
    assert decayed < named.keys()
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for name, p in named.items() if name in decayed], "weight_decay": 0.3},
            {"params": [p for name, p in named.items() if name not in decayed], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
    )
    clipped = 0
    for step, row in zip(range(8), result.history[1:]):
        rate = 1e-2 * step / 2 if step < 2 else 1e-2 * (0.1 + 0.9 * (1 + math.cos(math.pi * (step - 2) / 6)) / 2)
        tokens_BT, targets_BT = stream.random_windows(8, 12, seed=0, step=step)
        losses, objectives = [], []
        for half in (slice(0, 4), slice(4, 8)):
            out = reference(tokens_BT[half], targets_BT[half])
            objective = reference.objective(out)
            (objective / 2).backward()
            losses.append(out.loss.item())
            objectives.append(objective.item())
        norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.5).item()
        clipped += norm > 0.5
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        assert row["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
        assert row["objective"] == pytest.approx(np.mean(objectives), rel=1e-5)
        assert row["aux_loss"] == pytest.approx((row["objective"] - row["loss"]) / 0.5, rel=1e-4)
        assert row["grad_norm"] == pytest.approx(norm, rel=1e-4)
        assert row["learning_rate"] == pytest.approx(rate)
        assert row["tokens"] == (step + 1) * 8 * 12
    assert clipped, "the test is to cover clipping"
    assert distance(model, reference) < 1e-9


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant", [0, 0.5, 1, 1, 1, 1]),
        ("cosine", [0, 0.5, 1, *(0.1 + 0.9 * (1 + math.cos(math.pi * t / 4)) / 2 for t in (1, 2, 3))]),
        ("inverse_sqrt", [0, 0.5, 1, *((2 / t) ** 0.5 for t in (3, 4, 5))]),
        ("onecycle", [0.04, 0.52, 1, *((1 + math.cos(math.pi * t / 3)) / 2 for t in (1, 2, 3))]),
    ],
)
def test_schedules(schedule, rates):
    result = run(make_model(), steps=6, schedule=schedule, warmup_steps=2, log_every=1)
    assert [row["learning_rate"] / 1e-2 for row in result.history[1:]] == pytest.approx(rates, abs=1e-4)
    run(make_model(), steps=2, schedule=schedule, warmup_steps=0)
    run(make_model(), steps=3, schedule=schedule, warmup_steps=1)


def test_gradient_checkpointing_changes_no_weight():
    plain, sparing = make_moe(dropout=0.2), make_moe(dropout=0.2)
    run(plain)
    run(sparing, gradient_checkpointing=True)
    assert distance(plain, sparing) == 0
    assert not sparing.gradient_checkpointing


def test_precision_can_change_within_a_process():
    models = {name: make_moe() for name in ("bf16", "bf16 again", "fp32", "continued")}
    run(models["bf16"], precision="bf16")
    run(models["bf16 again"], precision="bf16")
    run(models["fp32"])
    assert distance(models["bf16"], models["bf16 again"]) == 0
    assert distance(models["bf16"], models["fp32"]) > 1e-6
    # a model that was trained before is wrapped again, and what comes out is the plain model
    models["continued"].load_state_dict(models["bf16"].state_dict())
    run(models["bf16"], precision="bf16")
    run(models["continued"], precision="bf16")
    assert distance(models["bf16"], models["continued"]) == 0
    assert models["bf16"].__dict__.keys() == make_moe().__dict__.keys()
    with pytest.raises(ValueError, match=r"fp16.*needs a GPU"):
        run(make_model(), precision="fp16")


def test_after_training():
    model = make_model()
    run(model)
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())


# ------------------------------------------------------------------------------------------------------ random numbers


def test_the_callers_random_numbers_are_untouched():
    def state():
        return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002

    model, before = make_moe(dropout=0.5), state()
    run(model)
    assert state() == before


def test_evaluation_and_callbacks_do_not_shift_dropout():
    plain, watched = make_moe(dropout=0.5), make_moe(dropout=0.5)
    run(plain, eval_every=0)
    train(watched, make_stream(), make_stream(200, seed=1), make_config(eval_every=1), **QUIET,
          callbacks=[lambda step, model, row: (torch.rand(3), model.train())])  # fmt: skip
    assert distance(plain, watched) == 0
    other = make_moe(dropout=0.5)
    run(other, seed=1)
    assert distance(plain, other) > 1e-4


def test_a_callback_may_ask_for_more_updates():
    """Besides the evaluations after 0, 4 and 8: row only where one was due (each 2nd update), always in eval mode."""

    class Watch:
        calls = ()

        def due(self, step):
            return step in (1, 4, 6)

        def __call__(self, step, model, row):
            self.calls += ((step, row and row["step"], bool(row and row["val_loss"]), model.training),)
            torch.rand(3)

    plain, watched = make_moe(dropout=0.5), make_moe(dropout=0.5)
    run(plain)
    train(watched, make_stream(), make_stream(200, seed=1), make_config(), callbacks=[watch := Watch()], **QUIET)
    assert distance(plain, watched) == 0
    assert watch.calls == (
        (0, 0, True, False), (1, None, False, False), (4, 4, True, False), (6, 6, False, False), (8, 8, True, False)
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------------- evaluation


def test_evaluate_counts_each_target_once():
    model, stream = make_moe(dropout=0.5).double().train(), make_stream(200)
    total = 0.0
    model.eval()
    for start in range(0, 199, 12):
        ids = torch.tensor(stream.tokens[start : start + 13].astype(np.int64))
        logits = model(ids[None, :-1]).logits_BTV[0]
        total -= logits.log_softmax(-1).gather(1, ids[1:, None]).sum().item()
    model.train()
    before = torch.get_rng_state()
    for batch_size in (1, 5, 100):
        assert evaluate(model, stream, batch_size=batch_size) == pytest.approx(total / 199, rel=1e-12)
    assert model.training and torch.equal(before, torch.get_rng_state())
    assert evaluate(model, stream, seq_len=6) != evaluate(model, stream)


# ------------------------------------------------------------------------------------------------------------- records


def test_history_and_files(tmp_path, capsys):
    seen = []

    def callback(step, model, row):
        seen.append((step, type(model), model.training, row["val_loss"]))

    model, streams = make_model(), (make_stream(), make_stream(200, seed=1))
    config = make_config(steps=7, eval_every=3, log_every=2)
    result = train(model, *streams, config, directory=tmp_path, callbacks=[callback], progress=True)
    every = run(make_model(), steps=7, log_every=1).history

    rows = result.history
    assert [row["step"] for row in rows] == [0, 2, 3, 4, 6, 7]
    assert [row["step"] for row in rows if row["val_loss"] is not None] == [0, 3, 6, 7]
    assert rows == [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert set(rows[0]) == {
        "step", "tokens", "loss", "objective", "val_loss", "aux_loss", "grad_norm", "learning_rate", "seconds",
        "cpu_seconds", "tokens_per_second",
    }  # fmt: skip
    assert rows[0]["loss"] is None and rows[0]["tokens"] == 0 and rows[0]["seconds"] == 0
    assert rows[4]["loss"] == pytest.approx((every[5]["loss"] + every[6]["loss"]) / 2)  # the updates since the last row
    assert rows[-1]["aux_loss"] is None
    assert 0 < rows[1]["seconds"] < rows[-1]["seconds"] == result.seconds
    assert seen == [(row["step"], DecoderLM, False, row["val_loss"]) for row in rows if row["val_loss"] is not None]
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert printed[0] == f"step    0/7  train     –  val {rows[0]['val_loss']:.3f}"
    assert printed[1] == f"step    3/7  train {rows[2]['loss']:.3f}  val {rows[2]['val_loss']:.3f}"
    assert len(printed) == 4
    best = min(row["val_loss"] for row in rows if row["val_loss"] is not None)
    assert evaluate(load_model(tmp_path / "best.safetensors"), streams[1]) == pytest.approx(best, rel=1e-6)
    assert distance(load_model(tmp_path / "latest.safetensors"), model) == 0


def test_best_is_not_latest_when_the_loss_rises(tmp_path):
    model = make_model()
    streams = make_stream(), make_stream(200, seed=1)
    run(model, steps=60)
    worse = make_config(steps=6, eval_every=2, learning_rate=1.0, schedule="constant", warmup_steps=4)
    result = train(model, *streams, worse, directory=tmp_path, **QUIET)
    assert result.final_loss > result.best_loss
    assert evaluate(load_model(tmp_path / "best.safetensors"), streams[1]) == pytest.approx(result.best_loss)
    assert evaluate(load_model(tmp_path / "latest.safetensors"), streams[1]) == pytest.approx(result.final_loss)


def test_a_finished_run_returns_at_once(tmp_path, monkeypatch):
    streams, config = (make_stream(), make_stream(200, seed=1)), make_config()
    trained, again = make_model(), make_model(seed=9)
    first = train(trained, *streams, config, directory=tmp_path, **QUIET)
    monkeypatch.setattr(training.Run, "update", None)
    assert train(again, *streams, config, directory=tmp_path, **QUIET) == first
    assert distance(trained, again) == 0


def test_tensorboard_gets_the_rows(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    streams = make_stream(), make_stream(200, seed=1)
    result = train(make_model(), *streams, make_config(trackers=("tensorboard",)), directory=tmp_path, **QUIET)
    events = EventAccumulator(str(tmp_path / "upcycling")).Reload().Scalars("val_loss")
    assert [event.step for event in events] == [0, 4, 8]
    assert events[-1].value == pytest.approx(result.final_loss)


# ---------------------------------------------------------------------------------------------------------- divergence


def test_a_run_that_diverges_says_so_and_keeps_its_checkpoint(tmp_path):
    def directory_bytes():
        return {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    model, streams = make_model(norm="rmsnorm"), (make_stream(), make_stream(200, seed=1))
    config = make_config(steps=9, schedule="constant", learning_rate=1e-3, checkpoint_every=3, grad_clip=0)
    kept = []

    def poison(step, model, row):
        if step == 4:
            kept.append(directory_bytes())
            model.norm.weight.data.fill_(math.inf)

    with pytest.raises(
        RuntimeError,
        match=r"loss became (nan|inf) at update 5 \(last finite loss \d\.\d+, learning rate 1\.0e-03\): lower the "
        r"learning rate or raise warmup_steps, or set grad_clip=1; the checkpoint of update 3 is intact",
    ):
        train(model, *streams, config, directory=tmp_path, callbacks=[poison], **QUIET)
    assert directory_bytes() == kept[0]
    assert train(make_model(norm="rmsnorm"), *streams, config, directory=tmp_path, **QUIET).history[-1]["step"] == 9


def test_a_learning_rate_that_is_far_too_high():
    with pytest.raises(RuntimeError, match=r"became .* at update \d+ .*learning rate 1\.0e\+30.*lower the learning"):
        run(make_model(), learning_rate=1e30, grad_clip=0, schedule="constant")


def test_weights_that_overflow_are_not_saved(tmp_path):
    model, streams = make_model(), (make_stream(), make_stream(200, seed=1))
    config = make_config(steps=4, learning_rate=1e39, schedule="constant", checkpoint_every=1)
    with pytest.raises(RuntimeError, match=r"a weight .* at update 1 .*no checkpoint"):
        train(model, *streams, config, directory=tmp_path, **QUIET)
    assert not (tmp_path / "latest.safetensors").exists()


def test_weights_that_are_not_finite_from_the_start():
    model = make_model()
    model.norm.weight.data[0] = math.nan
    with pytest.raises(RuntimeError, match=r"validation loss became nan at update 0.*the given weights"):
        run(model)


def test_an_infinite_gradient_changes_nothing(monkeypatch):
    model, untouched = make_model(), make_model()
    model.norm.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(RuntimeError, match=r"the gradient norm became (nan|inf) at update 1"):
        run(model)
    assert distance(model, untouched) == 0


# ------------------------------------------------------------------------------------------------------------ refusals


def test_refusals(tmp_path):
    model, good, config = make_model(), make_stream(), make_config()
    with pytest.raises(ValueError, match="training stream has token ids up to 39 but the model's vocabulary is 29"):
        train(model, make_stream(vocab_size=40), good, config)
    with pytest.raises(ValueError, match="validation stream has token ids up to 39"):
        train(model, good, make_stream(vocab_size=40), config)
    with pytest.raises(ValueError, match=r"has 12 tokens, but one window .* = 13"):
        train(model, make_stream(12), good, config)
    with pytest.raises(ValueError, match=r"warmup_steps=9 does not fit .*choose 0\.\.8"):
        run(model, warmup_steps=9)
    with pytest.raises(ValueError, match=r"warmup_steps=7 does not fit .*choose 0\.\.6"):
        run(model, warmup_steps=7, schedule="onecycle")
    with pytest.raises(ValueError, match="tracker 'mlflow' is unknown"):
        run(model, trackers=("mlflow",))
    with pytest.raises(ValueError, match=r"give train\(\) a directory"):
        run(model, trackers=("tensorboard",))
    for wrong in (dict(steps=0), dict(learning_rate=0.0), dict(schedule="linear"), dict(optimizer="sgd")):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
            make_config(**wrong)


def test_a_tracker_that_is_not_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="tracker 'wandb' is not installed; `pip install wandb`"):
        run(make_model(), trackers=("wandb",))


# -------------------------------------------------------------------------------------------------- several processes


def stop_at_update_5(*arguments, step, **keywords):
    if step == 5:
        raise KeyboardInterrupt
    return make_stream().random_windows(*arguments, step=step, **keywords)


def two_processes(directory: Path):
    """What each process of the test below does."""
    torch.set_num_threads(1)
    streams, config = (make_stream(), make_stream(200, seed=1)), make_config(checkpoint_every=3)
    result = train(make_moe(), *streams, config, directory=directory / "plain", **QUIET)

    # dropout on: the random states of both processes have to come back
    whole, resumed = make_moe(dropout=0.3), make_moe(dropout=0.3)
    train(whole, *streams, config, directory=directory / "whole", **QUIET)
    streams[0].random_windows = stop_at_update_5
    try:
        train(resumed, *streams, config, directory=directory / "resumed", **QUIET)
    except KeyboardInterrupt:
        del streams[0].random_windows
    train(resumed, *streams, config, directory=directory / "resumed", **QUIET)
    assert distance(whole, resumed) == 0
    print(f"process {os.environ['RANK']}: final loss {result.final_loss!r}")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="gloo under torchrun is not tested on Windows")
def test_two_processes_equal_one_with_accumulation(tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(LIBRARY), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    result = subprocess.run(command + [str(tmp_path)], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    one = make_moe()
    expected = run(one, accumulation=2)
    for rank in (0, 1):  # both processes know the loss of the whole validation set
        line = next(line for line in result.stdout.splitlines() if f"process {rank}: final loss" in line)
        assert float(line.split()[-1]) == pytest.approx(expected.final_loss, rel=1e-5)
    assert distance(load_model(tmp_path / "plain/latest.safetensors"), one) < 1e-5
    rows = [json.loads(line) for line in (tmp_path / "plain/history.jsonl").read_text().splitlines()]
    assert len(rows) == len(expected.history)
    for row, other in list(zip(rows, expected.history))[1:]:
        assert row["tokens"] == other["tokens"]
        for name in ("loss", "objective", "grad_norm"):
            assert row[name] == pytest.approx(other[name], rel=1e-4)
    # with another number of processes each has other data and dropout: refused
    with pytest.raises(ValueError, match=r"data\.processes is 2 there and 1 here"):
        train(make_moe(), make_stream(), make_stream(200, seed=1), make_config(), directory=tmp_path / "plain", **QUIET)


if __name__ == "__main__":
    two_processes(Path(sys.argv[1]))
