"""The benchmark's arithmetic and its command line; nothing here asserts a time."""

import json

import pytest

from upcycling import bench


def test_ratios_are_paired_and_the_middle_one_is_reported():
    pairs = [(2.0, 1.0), (3.0, 1.0), (40.0, 10.0), (5.0, 1.0), (600.0, 100.0)]  # a slow round slows both
    result = bench.compared("a", "b", "", pairs, goal=3.9)
    assert (result.lower_quartile, result.ratio, result.upper_quartile) == (3, 4, 5)
    assert result.rounds == 5 and result.reached is False
    assert bench.compared("a", "b", "", pairs, goal=4.0).reached is True
    assert bench.compared("a", "b", "", pairs, goal=None).reached is None


def test_runs_in_turn_and_leaves_the_warm_up_out():
    calls = []
    pairs = bench.interleave(lambda: calls.append("A"), lambda: calls.append("B"), rounds=4, warm_up=1)
    assert "".join(calls) == "ABBAABBAAB"
    assert len(pairs) == 4 and all(seconds >= 0 for pair in pairs for seconds in pair)


def test_seconds_belong_to_the_one_who_took_them(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])

    def takes(seconds):
        return lambda: clock.__setitem__(0, clock[0] + seconds)

    assert bench.interleave(takes(3), takes(1), rounds=3) == [(3, 1)] * 3


def test_command_prints_and_writes_what_it_measured(tmp_path, capsys):
    file = tmp_path / "out" / "bench.json"
    assert bench.main(["recording", "--rounds", "6", "--json", str(file)]) == 0
    (row,) = json.loads(file.read_text())["comparisons"]
    assert row["rounds"] == 6 and row["lower_quartile"] <= row["ratio"] <= row["upper_quartile"]
    printed = capsys.readouterr().out
    assert "routing recorded" in printed and f"{row['ratio']:.3f}" in printed
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize(("arguments", "said"), [(["speed"], "recording"), (["--rounds", "1"], "at least 6 rounds")])
def test_bad_arguments_are_explained(arguments, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.main(arguments)
    assert stopped.value.code == 2 and said in capsys.readouterr().err
