"""The benchmark's arithmetic, what its candidates compute, and its command line; nothing here asserts a time."""

import importlib
import json
from dataclasses import replace

import pytest
import torch

from upcycling.bench import layer as layer_case, measure as bench, scaling
from upcycling.bench.measure import Bench, compared
from upcycling.cli import main
from upcycling.core.moe import MoELayer


def test_ratios_are_paired_and_the_middle_one_is_reported():
    seconds = {"a": [2.0, 3.0, 40.0, 5.0, 600.0], "b": [1.0, 1.0, 10.0, 1.0, 100.0]}  # a slow round slows both
    result = compared("case", "", seconds, "a", "b", goal=3.9)
    assert (result.lower_quartile, result.ratio, result.upper_quartile) == (3, 4, 5)
    assert result.rounds == 5 and result.measure == "time" and result.reached is False
    assert compared("case", "", seconds, "a", "b", goal=4.0).reached is True
    assert compared("case", "", seconds, "a", "b").reached is None
    speed = compared("case", "", seconds, "b", "a", measure="speed", goal=4.0)
    assert (speed.ratio, speed.measure, speed.reached) == (4, "speed", True)
    assert compared("case", "", seconds, "b", "a", measure="speed", goal=4.1).reached is False


def test_runs_in_turn_and_leaves_the_warm_up_out():
    calls = []
    functions = {name: (lambda name=name: calls.append(name)) for name in "ABC"}
    seconds = Bench(rounds=3).times(functions, warm_up=1)
    assert "".join(calls) == "ABC" + "BCA" + "CAB" + "ABC"
    assert all(len(values) == 3 and min(values) >= 0 for values in seconds.values())
    assert len(Bench(rounds=3).times(functions, rounds=5)["A"]) == 5


@pytest.mark.parametrize(("threads", "clock"), [(1, "process_time"), (2, "perf_counter")])
def test_seconds_belong_to_the_one_who_took_them(threads, clock, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(bench.time, clock, lambda: now[0])

    def takes(seconds):
        return lambda: now.__setitem__(0, now[0] + seconds)

    seconds = Bench(rounds=3, threads=threads).times({"slow": takes(3), "quick": takes(1)})
    assert seconds == {"slow": [3] * 3, "quick": [1] * 3}


@pytest.mark.parametrize("case", bench.CASES)
def test_every_case_can_be_imported_and_has_its_function(case):
    module = importlib.import_module(f"upcycling.bench.{case}")
    assert callable(module.compare) and module.__doc__


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_all_layers_compute_the_same_and_a_different_one_is_noticed(activation, monkeypatch):
    shape = layer_case.Shape(32, 64, 4, 2, 16, activation)
    layers = layer_case.candidates(shape, "cpu")
    assert len(layers) == 6
    x_ND = torch.randn(16, 32)
    for module in layers.values():
        assert torch.allclose(module(x_ND), layers["the definition's loop"](x_ND), atol=1e-6)
    monkeypatch.setattr(layer_case._Tutorial, "forward", lambda self, x_ND: 1.01 * x_ND)
    with pytest.raises(RuntimeError, match="index_add loop over modules does not compute the same layer"):
        layer_case.candidates(shape, "cpu")


def test_command_prints_and_writes_what_it_measured(tmp_path, capsys):
    file = tmp_path / "out" / "bench.json"
    assert main(["bench", "recording", "--rounds", "6", "--json", str(file)]) == 0
    (row,) = json.loads(file.read_text())["comparisons"]
    assert row["rounds"] == 6 and row["lower_quartile"] <= row["ratio"] <= row["upper_quartile"]
    printed = capsys.readouterr().out
    assert "routing recorded" in printed and f"{row['ratio']:.3f}" in printed
    assert not list(tmp_path.rglob("*.tmp"))


def test_the_table_says_what_was_reached(capsys):
    seconds = {"a": [2.0, 2.0], "b": [1.0, 1.0]}
    lines = [compared("c", "here", seconds, "a", "b", goal=1.5), compared("c", "here", seconds, "a", "b")]
    lines.append(replace(lines[0], setting="there", measure="speed"))
    text = bench.table(lines)
    assert text.count("c: here") == text.count("c: there") == text.count("MISSED") == text.count("reached") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rounds", "1"], "'--rounds': 1 is too small; give at least 3"),
        (["--threads", "0"], "'--threads': 0 is too small; give at least 1"),
    ],
)
def test_bad_arguments_are_explained(arguments, said, capsys):
    assert main(["bench", *arguments]) == 2 and said in capsys.readouterr().err


def test_what_cannot_be_measured_is_explained(capsys, monkeypatch):
    assert main(["bench", "speed"]) == 1
    assert "there is no case 'speed'; choose from layer, scaling" in capsys.readouterr().err
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert main(["bench", "recording", "--device", "cuda"]) == 1
    assert "device='cuda': torch sees no accelerator" in capsys.readouterr().err


def test_the_layer_gets_a_new_batch_in_each_update(monkeypatch):
    """With the same batch each time every expert would get as many rows as before, which training never does."""
    seen, forward = [], layer_case.MoELayer.forward

    def watched(self, x_ND):
        if x_ND.requires_grad:
            seen.append(x_ND.data_ptr())
        return forward(self, x_ND)

    monkeypatch.setattr(layer_case.MoELayer, "forward", watched)
    lines = layer_case._training(Bench(rounds=4), layer_case.Shape(16, 32, 4, 2, 12))
    assert {line.rounds for line in lines} == {4}
    assert len(seen) == len(set(seen)) == 5 + 4, "warm-up and rounds"


def test_seconds_of_a_size_are_those_of_one_pass(monkeypatch):
    passes, forward = [], MoELayer.forward
    monkeypatch.setattr(MoELayer, "forward", lambda self, x: passes.append(x) or forward(self, x))

    class Counting(Bench):
        def times(self, functions, rounds):
            return {size: [self.count(run)] for size, run in functions.items()}

        def count(self, run):
            passes.clear()
            run()
            return float(len({id(x_ND) for x_ND in passes}))  # new tokens in each pass

    shape = layer_case.Shape(8, 16, experts=4, top_k=2, tokens=64)
    shapes = {tokens: replace(shape, tokens=tokens) for tokens in (2, 16, 64)}
    assert scaling._seconds(Counting(), shapes) == {2: [1.0], 16: [1.0], 64: [1.0]}
    assert len(passes) == 1
    assert scaling.exponent({2: 3.0, 16: 24.0, 64: 96.0}) == pytest.approx(1)
