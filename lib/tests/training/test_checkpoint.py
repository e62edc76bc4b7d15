"""Checkpoints: a killed run goes on bit for bit, a file that does not fit is refused, nothing is lost."""

import json
import os
import pickle
import signal
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from upcycling import files
from upcycling.core.config import ModelConfig, MoEConfig
from upcycling.core.model import DecoderLM
from upcycling.text.stream import TokenStream
from upcycling.training import checkpoint
from upcycling.training.checkpoint import load_model, save_model
from upcycling.training.config import TrainConfig
from upcycling.training.evaluation import evaluate
from upcycling.training.loop import train

LIBRARY = Path(checkpoint.__file__).parents[2]
TIMINGS = ("seconds", "cpu_seconds", "tokens_per_second")
VOCABULARY = 29


def make_streams():
    ids = np.random.default_rng(0).integers(0, 5, 1200).cumsum() % VOCABULARY
    return TokenStream.from_ids(ids[:1000], VOCABULARY), TokenStream.from_ids(ids[1000:], VOCABULARY)


def make_model(seed=0, **changes):
    moe = MoEConfig(num_experts=4, top_k=2, noisy=True)
    sizes = dict(vocab_size=VOCABULARY, d_model=16, n_layers=1, n_heads=2, d_ff=16, seq_len=12, dropout=0.2, moe=moe)
    torch.manual_seed(seed)
    return DecoderLM(ModelConfig.simple(**(sizes | changes)))


def make_config(**changes):
    settings = dict(steps=12, batch_size=2, accumulation=2, learning_rate=1e-2, warmup_steps=2, schedule="cosine")
    return TrainConfig(**(settings | dict(eval_every=4, log_every=3, checkpoint_every=2) | changes))


def run(directory, model=None, **changes):
    model = make_model() if model is None else model
    result = train(model, *make_streams(), make_config(**changes), directory=directory, progress=False, verbose=False)
    return model, result


# ------------------------------------------------------------------------------------------------------ killed runs


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at_call(module, name, call, before=lambda *arguments: None):
    """Replace module.name so that its n-th call first does `before`, then kills the process."""
    original, calls = getattr(module, name), []

    def function(*arguments, **keywords):
        calls.append(1)
        if len(calls) == call:
            before(*arguments)
            kill()
        return original(*arguments, **keywords)

    setattr(module, name, function)


def half_a_file(tensors, path, **_):
    save_file({"model.x": torch.zeros(9)}, path)
    os.truncate(path, 60)


def half_a_row(files, row):
    with open(files.history, "a") as file:
        file.write(json.dumps(row)[:40])


# Files are written in this order: best of step 0, latest of 2, best of 4 (if it is better), latest of 4 ...
MOMENTS = {
    "before the first checkpoint": lambda: kill_at_call(TokenStream, "random_windows", 2),
    "in the middle of an update": lambda: kill_at_call(torch.optim.Optimizer, "zero_grad", 6),
    "while a file is being written": lambda: kill_at_call(files, "save_file", 4, half_a_file),
    "before the file is flushed": lambda: kill_at_call(files.os, "fsync", 5),
    "between writing and renaming": lambda: kill_at_call(files.os, "replace", 5),
    "in the middle of a line of history": lambda: kill_at_call(checkpoint.RunFiles, "append", 5, half_a_row),
    "between history and checkpoint": lambda: kill_at_call(checkpoint, "save_checkpoint", 5),
    "after the last update, before the last checkpoint": lambda: kill_at_call(checkpoint, "save_checkpoint", 6),
}


def in_child(prepare, directory, updates=None, **changes):
    """Train in a forked process; kill it after it has begun `updates` updates. Returns whether it was killed."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        code = 1
        try:
            original = TokenStream.random_windows

            def random_windows(*arguments, **keywords):
                os.write(write, b".")
                return original(*arguments, **keywords)

            TokenStream.random_windows = random_windows
            prepare()
            run(directory, **changes)
            code = 0
        finally:
            os._exit(code)
    os.close(write)
    while os.read(read, 1):
        if updates is not None:
            updates -= 1
            if updates == 0:
                os.kill(child, signal.SIGKILL)
    os.close(read)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the training run itself failed"
    return os.WIFSIGNALED(status)


def state_of(directory):
    rows = [json.loads(line) for line in (directory / "history.jsonl").read_text().splitlines()]
    rows = [{name: value for name, value in row.items() if name not in TIMINGS} for row in rows]
    return load_file(directory / "latest.safetensors"), load_file(directory / "best.safetensors"), rows


def assert_loadable(directory):
    for name in ("latest", "best"):
        if (directory / f"{name}.safetensors").exists():
            load_model(directory / f"{name}.safetensors")


def assert_same(expected, actual, moment):
    for part in (0, 1):
        assert expected[part].keys() == actual[part].keys()
        for name, tensor in expected[part].items():
            assert torch.equal(tensor, actual[part][name]), f"killed {moment}: {name} differs"
    assert expected[2] == actual[2], f"killed {moment}: the history differs"


def kill_and_resume(root: Path, optimizer: str):
    """Everything of the test below, in a process that has trained nothing itself and so can fork."""
    torch.set_num_threads(1)
    import transformers.optimization  # noqa: F401 (once, not in every child)

    assert not in_child(lambda: None, root / "reference", optimizer=optimizer)
    expected = state_of(root / "reference")
    assert [row["step"] for row in expected[2]] == [0, 3, 4, 6, 8, 9, 12]
    for moment, prepare in MOMENTS.items():
        directory = root / moment
        assert in_child(prepare, directory, optimizer=optimizer), f"was not killed {moment}"
        assert_loadable(directory)
        assert not in_child(lambda: None, directory, optimizer=optimizer)
        assert_same(expected, state_of(directory), moment)
        assert not list(directory.glob("*.tmp"))
    rng, directory, killed = np.random.default_rng(), root / "again and again", 0
    while in_child(lambda: None, directory, updates=int(rng.integers(3, 6)), optimizer=optimizer):
        killed += 1
        assert_loadable(directory)
    assert killed >= 2
    assert_same(expected, state_of(directory), "again and again")


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_a_killed_run_resumes_bit_for_bit(tmp_path, optimizer):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(LIBRARY)}
    command = [sys.executable, __file__, str(tmp_path), optimizer]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


# ---------------------------------------------------------------------------------------------- save_model, load_model


@pytest.mark.parametrize("family", [ModelConfig.simple, ModelConfig.smol, ModelConfig.nano])
def test_a_model_comes_back_exactly(tmp_path, family):
    sizes = dict(vocab_size=VOCABULARY, d_model=16, n_layers=1, n_heads=2, d_ff=16, seq_len=12)
    for moe, dtype in ((None, torch.float32), (MoEConfig(num_experts=2, top_k=1), torch.bfloat16)):
        model = DecoderLM(family(**sizes, moe=moe)).to(dtype)
        save_model(model, tmp_path / "model.safetensors")
        before = torch.get_rng_state()
        loaded = load_model(tmp_path / "model.safetensors")
        assert torch.equal(before, torch.get_rng_state())
        assert loaded.config == model.config and not loaded.training
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, loaded.state_dict()[name]) and loaded.state_dict()[name].dtype == dtype
        if model.config.tie_embeddings:
            assert loaded.head.weight is loaded.token_embedding.weight


def test_the_model_of_a_training_checkpoint_loads(tmp_path):
    model, result = run(tmp_path)
    for name, tensor in load_model(tmp_path / "latest.safetensors").state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])
    best = load_model(tmp_path / "best.safetensors")
    assert evaluate(best, make_streams()[1]) == pytest.approx(result.best_loss, abs=1e-9)


# ------------------------------------------------------------------------------------------------ what is not accepted


def rewrite(path, change):
    """Let `change` edit the tensors and the decoded header of a checkpoint."""
    tensors, header = checkpoint.read_tensors(path)
    change(tensors, header)
    save_file(tensors, path, metadata={"upcycling": json.dumps(header)})


def with_header(header: bytes, length=None):
    return struct.pack("<Q", len(header) if length is None else length) + header


class Harmful:
    def __reduce__(self):
        return (open, ("harm", "w"))


HUGE = {"model.x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}
BROKEN_FILES = {
    "empty": lambda good: b"",
    "cut in its header": lambda good: good[:100],
    "cut in its tensors": lambda good: good[:-100],
    "a pickle": lambda good: pickle.dumps(Harmful()),
    "a header longer than the file": lambda good: with_header(b"{}", 2**62),
    "tensors larger than the file": lambda good: with_header(json.dumps(HUGE).encode()),
    "no metadata": lambda good: with_header(b"{}"),
    "metadata that is no JSON": lambda good: with_header(b'{"__metadata__": {"upcycling": "{oops"}}'),
    "metadata that is a list": lambda good: with_header(b'{"__metadata__": {"upcycling": "[]"}}'),
    "metadata nested too deep": lambda good: with_header(
        json.dumps({"__metadata__": {"upcycling": "[" * 10**5}}).encode()
    ),
    "another format": lambda good: with_header(b'{"__metadata__": {"upcycling": "{\\"format\\": 99}"}}'),
    "no configuration": lambda good: with_header(b'{"__metadata__": {"upcycling": "{\\"format\\": 1}"}}'),
}


@pytest.mark.parametrize("damage", BROKEN_FILES)
def test_a_broken_file_is_refused(tmp_path, monkeypatch, damage):
    monkeypatch.chdir(tmp_path)
    run(tmp_path, steps=2)
    latest = tmp_path / "latest.safetensors"
    broken = BROKEN_FILES[damage](latest.read_bytes())
    latest.write_bytes(broken)
    with pytest.raises(ValueError, match=r"latest\.safetensors"):
        load_model(latest)
    with pytest.raises(ValueError, match=r"latest\.safetensors"):
        run(tmp_path, steps=2)
    assert latest.read_bytes() == broken and not (tmp_path / "harm").exists()


def grow(tensors, header):
    tensors["model.norm.weight"] = torch.ones(17)


def drop(tensors, header):
    del tensors["model.norm.weight"]


def add(tensors, header):
    tensors["model.intruder"] = torch.ones(1)


def widen(tensors, header):
    header["model_config"]["d_ff"] = 10**9


def heighten(tensors, header):
    header["model_config"]["n_layers"] = 10**9


def invent(tensors, header):
    header["model_config"]["evil"] = 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (grow, r"norm.weight has shape \(17,\) but \(16,\) in the model"),
        (drop, "lacks 1 tensors of the model, norm.weight"),
        (add, "1 tensors that the model lacks, intruder"),
        (widen, r"has shape .* but .*1000000000.* in the model"),
        (heighten, "1000000000 layers"),
        (invent, "evil"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path, change, message):
    path = tmp_path / "model.safetensors"
    save_model(make_model(), path)
    rewrite(path, change)
    with pytest.raises(ValueError, match=message):
        load_model(path)


def lose_moment(tensors, header):
    del tensors["optimizer.norm.weight.exp_avg"]


def bend_moment(tensors, header):
    tensors["optimizer.norm.weight.exp_avg"] = torch.ones(3, 16)


def shorten_rng(tensors, header):
    tensors["rng.cpu"] = tensors["rng.cpu"][:, :-1]


def garble_rng(tensors, header):
    tensors["rng.cpu"].fill_(255)


def lose_standing(tensors, header):
    del header["standing"]["step"]


def empty_schedule(tensors, header):
    header["scheduler"] = []


def empty_groups(tensors, header):
    header["optimizer_groups"] = []


@pytest.mark.parametrize(
    "change", [lose_moment, bend_moment, shorten_rng, garble_rng, lose_standing, empty_schedule, empty_groups]
)
def test_a_state_that_does_not_fit_is_refused(tmp_path, change):
    run(tmp_path, steps=2)
    rewrite(tmp_path / "latest.safetensors", change)
    model, untouched = make_model(seed=5), make_model(seed=5)
    with pytest.raises(ValueError, match=r"latest\.safetensors cannot be resumed from"):
        run(tmp_path, model, steps=2)
    if change is garble_rng:  # known only when torch tries it
        return
    for name, tensor in untouched.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.safetensors"):
        load_model(tmp_path / "nowhere.safetensors")


# --------------------------------------------------------------------------------------------------- another run's file


def test_a_checkpoint_of_another_configuration_names_the_fields(tmp_path):
    run(tmp_path, steps=2)
    with pytest.raises(ValueError, match=r"model\.d_ff is 16 there and 32 here; model\.seq_len is 12 there and 8 here"):
        run(tmp_path, make_model(d_ff=32, seq_len=8), steps=2)
    with pytest.raises(ValueError, match=r"model\.moe is .*num_experts"):
        run(tmp_path, make_model(moe=None), steps=2)
    with pytest.raises(ValueError, match=r"training\.learning_rate is 0\.01 there and 0\.02 here.*resume=False"):
        run(tmp_path, steps=2, learning_rate=0.02)
    _, validation_stream = make_streams()
    with pytest.raises(ValueError, match=r"data\.train_stream"):
        train(make_model(), validation_stream, validation_stream, make_config(steps=2), directory=tmp_path)
    run(tmp_path, steps=2, eval_every=1, log_every=1, checkpoint_every=1, gradient_checkpointing=True)


def test_only_open_ended_schedules_can_be_prolonged(tmp_path):
    for schedule in ("constant", "inverse_sqrt"):
        long, _ = run(tmp_path / "long", schedule=schedule, steps=6)
        run(tmp_path / schedule, schedule=schedule, steps=4)
        prolonged, result = run(tmp_path / schedule, schedule=schedule, steps=6)
        assert [row["step"] for row in result.history] == [0, 3, 4, 6]
        for name, tensor in long.state_dict().items():
            assert torch.equal(tensor, prolonged.state_dict()[name])
        with pytest.raises(ValueError, match=r"training\.steps is 6 there and 5 here"):
            run(tmp_path / schedule, schedule=schedule, steps=5)
        (tmp_path / "long/latest.safetensors").unlink()
    for schedule in ("cosine", "onecycle"):
        run(tmp_path / schedule, schedule=schedule, steps=4)
        with pytest.raises(ValueError, match=r"training\.steps is 4 there and 6 here"):
            run(tmp_path / schedule, schedule=schedule, steps=6)


def test_resume_false_starts_over(tmp_path):
    run(tmp_path, steps=4)
    train(make_model(), *make_streams(), make_config(steps=2, learning_rate=1e-3), directory=tmp_path, resume=False,
          progress=False, verbose=False)  # fmt: skip
    assert [row["step"] for row in state_of(tmp_path)[2]] == [0, 2]


# ------------------------------------------------------------------------------------------------------------ full disk


def test_a_full_disk_leaves_the_former_checkpoint(tmp_path):
    resource = pytest.importorskip("resource")
    run(tmp_path, steps=2, schedule="constant")
    before = (tmp_path / "latest.safetensors").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))  # writing beyond it fails
    try:
        with pytest.raises(OSError, match=r"could not write .*latest\.safetensors.*former file is intact"):
            run(tmp_path, steps=4, schedule="constant")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "latest.safetensors").read_bytes() == before
    assert not list(tmp_path.glob("*.tmp"))
    _, result = run(tmp_path, steps=4, schedule="constant")
    assert [row["step"] for row in result.history] == [0, 2, 3, 4]


@pytest.mark.parametrize("place", ["save_file", "os.fsync", "os.replace"])
def test_no_space_left(tmp_path, monkeypatch, place):
    path = tmp_path / "model.safetensors"
    save_model(make_model(seed=1), path)

    def fail(*arguments, **keywords):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"upcycling.files.{place}", fail)
    with pytest.raises(OSError, match=r"could not write .*No space left on device.*free disk space"):
        save_model(make_model(seed=2), path)
    monkeypatch.undo()
    assert torch.equal(load_model(path).head.weight, make_model(seed=1).head.weight)
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def test_history_that_cannot_be_written(tmp_path):
    (tmp_path / "history.jsonl").mkdir()
    with pytest.raises(OSError, match=r"history\.jsonl"):
        run(tmp_path, steps=2)


if __name__ == "__main__":
    kill_and_resume(Path(sys.argv[1]), sys.argv[2])
