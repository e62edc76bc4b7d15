"""The comparison's arithmetic by hand, its costs against the formulas, and whole ones on a tiny preset."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from tiny import SHORT, TINY

from upcycling.cli import main
from upcycling.core.config import ModelConfig, MoEConfig
from upcycling.core.initialisation import Copy, Drop
from upcycling.core.routers import StraightThrough, TopP
from upcycling.core.routing import expert_load
from upcycling.core.transfer import upcycle
from upcycling.cost.parts import forward_flops
from upcycling.experiments import budgets, compare as compare_module
from upcycling.experiments.arms import ARM_SETS, DENSE, Arm, upcycling_arms
from upcycling.experiments.budgets import BUDGETS, costs, update_flops, updates_per_budget
from upcycling.experiments.compare import compare, describe, setting
from upcycling.experiments.presets import PRESETS
from upcycling.experiments.results import losses, margin, overview, paired, summarize, table
from upcycling.experiments.series import Series, load_series, new_model
from upcycling.routing.metrics import domain_divergence, domain_specialization
from upcycling.training.evaluation import evaluate

MOE = Arm("upcycled MoE", TINY.moe)
# softmax over infinite scores is NaN: measured like any other, but its training stops with an error
BROKEN = Arm("broken", replace(TINY.moe, router_std=1e38))
STORED = Path(__file__).resolve().parents[3] / "notebooks" / "results"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return tiny.prepare(tmp_path_factory.mktemp("artifacts"))


@pytest.fixture(autouse=True)
def _tiny(prepared, tmp_path, monkeypatch):
    shutil.copytree(prepared, tmp_path / "artifacts")
    monkeypatch.setenv("UPCYCLING_ARTIFACTS", str(tmp_path / "artifacts"))
    for name in ("UPCYCLING_PRESET", "UPCYCLING_CORPUS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(PRESETS, "tiny", TINY)


def cheap(monkeypatch, flops=1.25, seconds=1.5):
    """Costs as given, not measured: every MoE costs the same."""

    def given(series, arms):
        dense, sparse = dict.fromkeys(BUDGETS, 1.0), {"tokens": 1.0, "FLOPs": flops, "seconds": seconds}
        return {arm.name: dense if arm.moe is None else sparse for arm in arms}

    monkeypatch.setattr(compare_module, "costs", given)


def synthetic(losses, floor=0.5, **routing):
    """losses: (arm, budget) -> one validation loss per seed."""
    rows = [
        dict(arm=arm, budget=budget, seed=seed, val_loss=loss, updates=100 + len(arm), **routing)
        for (arm, budget), values in losses.items()
        for seed, loss in enumerate(values)
    ]
    return dict(rows=rows, floor=floor)


RESULT = synthetic(
    {
        ("dense control", "tokens"): [1.0, 1.2, 1.1],
        ("upcycled MoE", "tokens"): [0.75, 0.8, 0.7],
        ("dense control", "FLOPs"): [0.9, 0.9, 0.9],
        ("upcycled MoE", "FLOPs"): [0.75, 0.8, 0.7],
        ("upcycled MoE", "seconds"): [0.75],
    }
)


# --------------------------------------------------------------------------------------------------------- budgets


def test_updates_per_budget():
    preset = replace(TINY, dense=replace(SHORT, steps=100), sparse=replace(SHORT, steps=200))
    cost = {
        "dense control": {"tokens": 1, "FLOPs": 1.0, "seconds": 1.0},
        "upcycled MoE": {"tokens": 1, "FLOPs": 1.25, "seconds": 1.6},
        "MoE from scratch": {"tokens": 1, "FLOPs": 1.25, "seconds": 1.6},
        "all experts": {"tokens": 1, "FLOPs": 2.5, "seconds": 1.6},
    }
    arms = [*upcycling_arms(preset), Arm("all experts", replace(preset.moe, router=StraightThrough()))]
    updates = updates_per_budget(preset, arms, cost, "upcycled MoE")
    assert updates == {
        "dense control": {200: ["tokens"], 250: ["FLOPs"], 320: ["seconds"]},
        "upcycled MoE": {200: ["tokens", "FLOPs", "seconds"]},
        # 100 / 1.25 for the parent's share; 62.5 rounds to the even 62
        "MoE from scratch": {300: ["tokens"], 280: ["FLOPs"], 262: ["seconds"]},
        "all experts": {200: ["tokens", "seconds"], 100: ["FLOPs"]},
    }
    by_dense = updates_per_budget(preset, arms, cost, "dense control", ["FLOPs"])
    expected = {"dense control": 200, "upcycled MoE": 160, "MoE from scratch": 240, "all experts": 80}
    assert by_dense == {name: {steps: ["FLOPs"]} for name, steps in expected.items()}


def test_nearly_equal_updates_become_one_run():
    preset = replace(TINY, sparse=replace(SHORT, steps=1000))
    arms = [MOE, Arm("other", replace(TINY.moe, z_weight=0.1))]
    for own, expected in ((1 / 1.019, 1000), (1 / 1.021, 1021), (1 / 0.981, 1000), (1 / 0.979, 979)):
        cost = {"upcycled MoE": {"tokens": 1, "seconds": 1.0}, "other": {"tokens": 1, "seconds": own}}
        updates = updates_per_budget(preset, arms, cost, "upcycled MoE", ["tokens", "seconds"])
        assert list(updates["other"]) == list(dict.fromkeys([1000, expected]))
    cost["other"]["tokens"] = own
    alone = updates_per_budget(preset, arms, cost, "upcycled MoE", ["seconds"])
    assert alone["other"] == {979: ["seconds"]}, "of one arm"


@pytest.mark.parametrize("make", [ModelConfig.simple, ModelConfig.smol], ids=["simple", "smol"])
def test_flops_of_an_update_are_three_times_the_formula(make):
    config = make(vocab_size=60, d_model=16, n_layers=2, n_heads=2, d_ff=24, seq_len=8)
    tokens_BT = torch.randint(60, (3, 8))
    for moe in (None, TINY.moe, replace(TINY.moe, num_experts=8, layers=(1,), shared_experts=1)):
        model = new_model(replace(config, moe=moe), 0)
        assert update_flops(model, tokens_BT, tokens_BT) == 3 * 3 * forward_flops(model.config), moe
        assert all(parameter.grad is None for parameter in model.parameters())


def test_flops_are_those_that_a_rule_executes():
    config = ModelConfig.smol(vocab_size=60, d_model=16, n_layers=1, n_heads=2, d_ff=24, seq_len=8)
    tokens_BT = torch.randint(60, (3, 8))

    def flops(**fields):
        return update_flops(new_model(replace(config, moe=replace(TINY.moe, **fields)), 0), tokens_BT, tokens_BT)

    one, two, four = flops(top_k=1), flops(top_k=2), flops(top_k=4)
    assert two - one == (four - two) / 2 > 0
    assert flops(top_k=2, router=StraightThrough()) == four, "all are computed for the router's gradient"
    assert flops(router=TopP(threshold=1.0)) == four
    assert flops(capacity_factor=0.5) <= one, "what is dropped is not computed"


def test_costs_are_measured_once_and_shared_by_equal_configurations(monkeypatch):
    series = load_series("tiny")
    twice = [DENSE, MOE, Arm("drop", TINY.moe, Drop(0.5)), Arm("MoE from scratch", TINY.moe, start="scratch")]
    before = torch.random.get_rng_state()
    cost = costs(series, twice, rounds=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert cost["dense control"] == dict.fromkeys(BUDGETS, 1.0)
    moe = replace(TINY.model, moe=TINY.moe)
    assert cost["upcycled MoE"]["FLOPs"] == round(forward_flops(moe) / forward_flops(TINY.model), 3)
    assert 1 < cost["upcycled MoE"]["FLOPs"] < 2 and cost["upcycled MoE"]["tokens"] == 1
    assert cost["upcycled MoE"]["seconds"] > 0
    assert cost["drop"] == cost["MoE from scratch"] == cost["upcycled MoE"]

    asked = []

    def measure(models, batches):
        asked.append([model.config.moe for model in models])
        return [1.0, 7.0]

    monkeypatch.setattr(budgets, "seconds_ratios", measure)
    other = Arm("one expert", replace(TINY.moe, top_k=1))
    longer = costs(load_series("tiny"), [*twice, other])
    assert asked == [[None, other.moe]], "only what is not known yet, in turn with the dense model"
    assert longer == cost | {"one expert": longer["one expert"]} and longer["one expert"]["seconds"] == 7.0


def test_seconds_are_medians_of_what_each_round_took(monkeypatch):
    models = [new_model(TINY.model, seed) for seed in (0, 1)]
    spent = [1.0, 9.0, 1.0, 9.0, 1.0, 2.0, 2.0, 3.0, 1.0, 9.0]  # dense, other, dense, other, ...; two rounds warm up
    ticks = iter([tick for seconds in spent for tick in (0, seconds)])
    monkeypatch.setattr(budgets, "time", SimpleNamespace(process_time=lambda: next(ticks)))
    before = [model.token_embedding.weight.clone() for model in models]
    tokens_BT = torch.randint(300, (2, 8))
    assert budgets.seconds_ratios(models, [(tokens_BT, tokens_BT)] * 5) == [1.0, 2.0]  # of 2, 1.5 and 9
    assert not any(torch.equal(model.token_embedding.weight, old) for model, old in zip(models, before, strict=True))


# ---------------------------------------------------------------------------------------------------------- tables


def test_summarize():
    rows = {(row["arm"], row["budget"]): row for row in summarize(RESULT)}
    assert len(rows) == 5
    dense = rows["dense control", "tokens"]
    assert dense["mean"] == pytest.approx(1.1)
    assert dense["spread"] == pytest.approx(0.1)  # sample standard deviation
    assert dense["updates"] == 113
    assert rows["dense control", "FLOPs"]["spread"] == 0
    moe = rows["upcycled MoE", "tokens"]
    assert moe["mean"] == pytest.approx(0.75)
    assert moe["difference"] == pytest.approx(-0.35)  # -0.25, -0.4, -0.4
    assert moe["paired_spread"] == pytest.approx(0.0075**0.5)
    alone = rows["upcycled MoE", "seconds"]
    assert alone["spread"] != alone["spread"], "one seed has no spread"
    assert alone["difference"] != alone["difference"], "and no dense control at this budget"
    assert [row["budget"] for row in summarize(RESULT)] == ["tokens", "tokens", "FLOPs", "FLOPs", "seconds"]


def test_paired_takes_the_seeds_that_both_have():
    rows = [dict(arm="a", budget="tokens", seed=seed, val_loss=loss) for seed, loss in ((0, 1.0), (1, 2.0), (5, 9.0))]
    rows += [dict(arm="b", budget="tokens", seed=seed, val_loss=loss) for seed, loss in ((1, 1.5), (0, 0.7), (2, 0.0))]
    a, b = (losses({"rows": rows}, arm, "tokens") for arm in "ab")
    assert paired(a, b) == pytest.approx((0.4, 0.02**0.5))
    assert paired(b, a) == pytest.approx((-0.4, 0.02**0.5))
    mean, spread = paired(losses({"rows": rows}, "a", "FLOPs"), b)
    assert mean != mean and spread != spread


def test_margin():
    assert margin(RESULT, "tokens") == pytest.approx((0.35, 0.1))
    assert margin(RESULT, "FLOPs") == pytest.approx((0.15, 0.05))
    worse = synthetic({("dense control", "tokens"): [1.0, 1.0], ("upcycled MoE", "tokens"): [1.2, 1.2]})
    assert margin(worse, "tokens") == pytest.approx((-0.2, 0)), "negative where the MoE loses"
    named = synthetic({("base", "tokens"): [1.0, 1.0], ("best", "tokens"): [0.5, 0.7], ("third", "tokens"): [0.1, 0.1]})
    assert margin(named | dict(reference="best", control="base"), "tokens") == pytest.approx((0.4, 0.02**0.5))


def test_table():
    header, first, *others = table(RESULT).splitlines()
    assert header.split("  ")[0].strip() == "equal"
    assert first.split() == ["tokens", "dense", "control", "113", "1.100", "0.1000", "0.600"]
    assert len(others) == 4
    assert len({len(line) for line in (header, first, *others)}) == 1, "columns stand below each other"
    assert table(RESULT | dict(floor=None)).splitlines()[1].split()[-1] == "0.1000", "no gap to an unknown floor"
    long = synthetic({("a name that is longer than most", "tokens"): [1.0, 2.0], ("b", "tokens"): [1.0, 2.0]})
    assert len({len(line) for line in table(long).splitlines()}) == 1


def cells(text):
    header, _, *lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line]
    return {line[0]: dict(zip(header, line, strict=True)) for line in lines}


def test_overview():
    shown = cells(overview(RESULT))
    assert list(shown) == ["dense control", "upcycled MoE"]
    assert shown["dense control"] == {
        "arm": "dense control",
        "equal tokens": "1.1000 ± 0.1000",
        "tokens: from dense": "",
        "equal FLOPs": "0.9000 ± 0.0000",
        "FLOPs: from dense": "",
        "equal seconds": "",
    }, "what nobody has is no column"
    moe = shown["upcycled MoE"]
    assert (moe["equal tokens"], moe["tokens: from dense"]) == ("0.7500 ± 0.0500", "-0.3500 ± 0.0866")
    assert moe["equal seconds"] == "0.7500"
    assert len({len(line) for line in overview(RESULT).splitlines()}) == 1
    assert "2%" not in overview(RESULT) and "2%" in overview(RESULT | dict(shared_within=0.02))

    routing = dict(max_load=[1.5, 2.5], dead_experts=[0, 3], jsd=[0.1, 0.3], experts_per_token=[2, 1], dropped=[0, 0.5])
    unknown = dict(max_load=[3.5, 1.0], dead_experts=[0, 0], jsd=[None, None], experts_per_token=[2, 2], dropped=[0, 0])
    two = synthetic({("moe", "tokens"): [1.0, 2.0]}, **routing)
    two["rows"][1] |= unknown
    two["rows"] += synthetic({("moe", "FLOPs"): [1.0, 2.0]}, **unknown)["rows"]
    (line,) = cells(overview(two)).values()
    found = [line[name] for name in ("max load", "dead", "JSD", "experts", "dropped")]
    assert found == ["3.00", "1.5", "0.200", "1.75", "12.5%"], "of the first budget"


def test_a_result_that_was_stored_before_still_holds():
    for name in ("worlds", "tinystories"):
        stored = json.loads((STORED / f"arms_{name}_quick.json").read_text(encoding="utf-8"))
        assert stored["setting"]["moe"] == setting(Series(replace(TINY, moe=PRESETS["quick"].moe), "worlds"))["moe"]
        assert (
            margin(stored, "tokens")[0] > 0 and "upcycled MoE" in table(stored) and "upcycled MoE" in overview(stored)
        )


def test_the_setting_changes_with_what_the_result_depends_on(monkeypatch):
    series = load_series("tiny")
    here = setting(series)
    assert json.loads(json.dumps(here)) == here
    assert setting(load_series("tiny")) == here
    for changes in (
        dict(dense=replace(SHORT, learning_rate=1.0)),
        dict(sparse=replace(SHORT, steps=9)),
        dict(moe=MoEConfig(num_experts=4, top_k=1)),
        dict(moe=replace(TINY.moe, balance="pooled")),
        dict(moe=replace(TINY.moe, router=TopP())),
        dict(model=replace(TINY.model, d_ff=8)),
        dict(documents=130),
    ):
        monkeypatch.setitem(PRESETS, "tiny", replace(TINY, **changes))
        assert setting(load_series("tiny")) != here, changes
    other_seed = replace(TINY, dense=replace(SHORT, seed=9), sparse=replace(TINY.sparse, seed=9))
    monkeypatch.setitem(PRESETS, "tiny", other_seed)
    assert setting(load_series("tiny")) == here, "seeds are the arms' own"


# ------------------------------------------------------------------------------------------------------------ arms


@pytest.mark.parametrize("name", ARM_SETS)
def test_every_set_of_arms_makes_a_comparison(name):
    arms = ARM_SETS[name](TINY)
    assert compare_module._checked(arms, ["tokens"], [0], None) in [arm.name for arm in arms if arm.moe is not None]
    assert len({(arm.moe, repr(arm.init), arm.start) for arm in arms}) == len(arms), "no two are the same"
    assert DENSE in arms
    dense, tokens_BT = new_model(TINY.model, 0), torch.randint(300, (2, 32))
    for arm in arms:
        if arm.moe is not None:
            assert torch.isfinite(upcycle(dense, arm.moe, arm.init)(tokens_BT, tokens_BT).loss), arm.name
        assert json.loads(json.dumps(arm.to_dict()))["name"] == arm.name


def test_the_pooling_arms_are_two_by_two():
    made = {(arm.moe.balance, arm.init) for arm in ARM_SETS["pooling"](TINY) if arm.moe is not None}
    assert made == {(balance, init) for balance in ("layer", "pooled") for init in ("copy", Drop(0.5))}


def test_an_arm_is_described_with_its_rule_and_its_initialisation():
    arm = Arm("mine", replace(TINY.moe, router=TopP(threshold=0.5), layers=(0,)), Drop(0.25))
    described = arm.to_dict()
    assert described["init"] == repr(Drop(0.25)) and described["moe"]["router"] == repr(TopP(threshold=0.5))
    assert (described["moe"]["num_experts"], described["moe"]["layers"]) == (4, "(0,)")
    assert DENSE.to_dict() == dict(name="dense control", moe=None, init="copy", start="parent")


def test_what_makes_no_comparison():
    def error(match, arms, *rest, **options):
        with pytest.raises(ValueError, match=match):
            compare(arms, *rest, preset=TINY, **options)

    error("its own", [MOE, MOE])
    error("its own", [])
    error("choose of tokens", [MOE], ["tokens", "hours"])
    error("choose of tokens", [MOE], [])
    error("one twice", [MOE], BUDGETS, [0, 0])
    error("one twice", [MOE], BUDGETS, [])
    error("reference=", [DENSE])
    error("'nobody' is none of the arms", [MOE], reference="nobody")
    with pytest.raises(ValueError, match="start='above'"):
        Arm("x", start="above")


def test_describe_counts_what_was_carried_out(monkeypatch):
    series = load_series("tiny")
    dense, _ = series.dense_parent(progress=False, verbose=False)
    assert describe(series, dense) == {
        "per_domain": {name: evaluate(dense, stream) for name, stream in series.domain_streams().items()}
    }
    monkeypatch.setattr("upcycling.experiments.compare.evaluate", lambda *_: 0.0)

    model = upcycle(dense, replace(TINY.moe, router_std=1.0))
    found = describe(series, model)
    tokens_BT, _ = series.validation_stream.random_windows(64, 32, seed=0, step=0)
    with torch.no_grad():
        load_LE = torch.stack([expert_load(routing) for routing in model(tokens_BT).routings])
    assert found["max_load"] == pytest.approx((load_LE.amax(-1) * 4).tolist()), "as for all windows at once"
    assert found["dead_experts"] == (load_LE == 0).sum(-1).tolist()
    assert found["experts_per_token"] == [2.0, 2.0] and found["dropped"] == [0.0, 0.0]

    windows = [tokens_BT for tokens_BT, _ in series.domain_windows(16).values()]
    labels_N = torch.cat([torch.full((tokens_BT.numel(),), i) for i, tokens_BT in enumerate(windows)])
    with torch.no_grad():
        ids = [torch.cat([model(t).routings[layer].expert_ids_NK for t in windows]) for layer in range(2)]
    expected = [float(domain_divergence(domain_specialization(ids_NK, labels_N, 4))) for ids_NK in ids]
    assert found["jsd"] == pytest.approx(expected, rel=1e-4) and min(expected) > 0

    full = describe(series, upcycle(dense, replace(TINY.moe, router_std=1.0, capacity_factor=0.5)))
    assert all(0.4 < dropped < 0.8 for dropped in full["dropped"])
    made = [2 * (1 - dropped) for dropped in full["dropped"]]
    assert full["experts_per_token"] == pytest.approx(made, abs=1e-3)
    assert describe(series, upcycle(dense, replace(TINY.moe, router=TopP(threshold=1.0))))["experts_per_token"] == [
        4,
        4,
    ]


def test_no_domains_no_divergence(monkeypatch):
    series = load_series("tiny")
    monkeypatch.setattr(Series, "domain_streams", lambda self: {})
    found = describe(series, series.arm(MOE))
    assert found["jsd"] == [None, None] and found["per_domain"] == {}


# --------------------------------------------------------------------------------------------------- whole comparisons


def runs(tmp_path):
    """{folder: when its result was written} of all trained models but the parent."""
    made = (tmp_path / "artifacts" / "runs").glob("*/latest.safetensors")
    return {path.parent.name: path.stat().st_mtime_ns for path in made if "parent" not in path.parent.name}


def test_a_whole_comparison(tmp_path, monkeypatch, capsys):
    cheap(monkeypatch)
    out = tmp_path / "results" / "arms.json"
    threads = torch.get_num_threads()
    assert main(["compare", "--preset", "tiny", "--seeds", "0", "1", "--out", str(out)]) == 0
    assert torch.get_num_threads() == threads
    result = json.loads(out.read_text(encoding="utf-8"))
    assert [path.name for path in out.parent.iterdir()] == ["arms.json"], "no temporary file is left"
    printed = capsys.readouterr().out
    assert table(result) in printed and overview(result) in printed

    rows = result["rows"]
    assert len({(row["arm"], row["budget"], row["seed"]) for row in rows}) == len(rows) == 3 * 3 * 2
    series = load_series("tiny")
    assert result["floor"] == pytest.approx(series.floor.overall)
    assert result["setting"] == setting(series)
    assert (result["corpus"], result["seeds"], result["failed"]) == ("worlds", [0, 1], [])
    assert (result["reference"], result["control"]) == ("upcycled MoE", "dense control")
    assert result["ratios"] == {"flops": 1.25, "seconds": 1.5}
    assert [arm["name"] for arm in result["arms"]] == ["dense control", "upcycled MoE", "MoE from scratch"]
    updates = updates_per_budget(TINY, upcycling_arms(TINY), result["costs"], "upcycled MoE")
    for row in rows:
        assert row["budget"] in updates[row["arm"]][row["updates"]]
        assert row["history"][0][0] == 0
        assert row["history"][-1] == [row["updates"], row["val_loss"]]
        assert row["cpu_seconds"] > 0
        assert row["per_domain"].keys() == series.floor.by_domain.keys()
        assert ("max_load" in row) == (row["arm"] != "dense control")

    before = runs(tmp_path)
    assert len(before) == 2 * (3 + 1 + 2), "from scratch, 6 updates are those of FLOPs and of seconds"
    kept = {(row["arm"], row["budget"]): row["val_loss"] for row in rows if row["seed"] == 1}
    quiet = dict(progress=False, verbose=False)
    assert series.moe(1, **quiet)[1].final_loss == kept["upcycled MoE", "seconds"]
    assert len(series.moe_snapshots(1, **quiet)) > 0
    same = Arm("of another name", replace(TINY.moe), Copy())
    assert series.train_arm(same, 1, 4, **quiet)[1].final_loss == kept["upcycled MoE", "seconds"]
    assert series.dense_control(1, 6, **quiet)[1].final_loss == kept["dense control", "seconds"]
    scratch = Arm("of another name", TINY.moe, start="scratch")
    assert series.train_arm(scratch, 1, 7, **quiet)[1].final_loss == kept["MoE from scratch", "tokens"]
    assert runs(tmp_path) == before, "they are the runs that the series keeps, made once"


def test_without_the_arm_from_scratch(monkeypatch, tmp_path):
    cheap(monkeypatch, 1.0, 1.0)
    out = tmp_path / "arms.json"
    assert main(["compare", "--preset", "tiny", "--seeds", "0", "--no-scratch", "--out", str(out)]) == 0
    result = json.loads(out.read_text(encoding="utf-8"))
    assert {row["arm"] for row in result["rows"]} == {"dense control", "upcycled MoE"}
    assert {row["budget"] for row in result["rows"]} == set(BUDGETS)
    assert len(runs(tmp_path)) == 2, "equal numbers of updates are one run"


def test_other_arms_by_name(monkeypatch, tmp_path):
    cheap(monkeypatch)
    out = tmp_path / "arms.json"
    chosen = ["--arms", "pooling", "--budgets", "tokens"]
    assert main(["compare", "--preset", "tiny", "--seeds", "3", "--out", str(out), *chosen]) == 0
    result = json.loads(out.read_text(encoding="utf-8"))
    assert [(row["arm"], row["budget"]) for row in result["rows"]] == [
        (name, "tokens")
        for name in ("dense control", "copy, per layer", "copy, pooled", "drop, per layer", "drop, pooled")
    ]
    assert len({row["val_loss"] for row in result["rows"]}) == 5


@pytest.mark.slow
def test_in_two_processes_with_an_arm_that_fails(monkeypatch, tmp_path, capsys):
    cheap(monkeypatch)
    out = tmp_path / "arms.json"
    result = compare([BROKEN, DENSE, MOE], ["tokens"], [0, 1], preset=TINY, workers=2, reference=MOE.name, out=out)
    assert [(row["seed"], row["arm"]) for row in result["rows"]] == [
        (seed, arm) for seed in (0, 1) for arm in ("dense control", "upcycled MoE")
    ], "in order, whichever ended first"
    assert [(failure["arm"], failure["updates"]) for failure in result["failed"]] == [("broken", 4)] * 2
    assert "became" in result["failed"][0]["error"] and "run_arm" in result["failed"][0]["traceback"]
    assert json.loads(out.read_text(encoding="utf-8"))["rows"] == json.loads(json.dumps(result["rows"]))
    assert capsys.readouterr().out.count("FAILED") == 2
    moe = load_series("tiny").moe(0, progress=False, verbose=False)[1].final_loss
    assert moe == result["rows"][1]["val_loss"], "as in this process"


def test_a_failed_arm_is_an_exit_status(monkeypatch, capsys):
    cheap(monkeypatch)
    monkeypatch.setitem(ARM_SETS, "upcycling", lambda preset: [DENSE, MOE, BROKEN])
    assert main(["compare", "--preset", "tiny", "--seeds", "0", "--budgets", "tokens"]) == 1
    shown = capsys.readouterr()
    assert "FAILED: broken, seed 0" in shown.err and "upcycled MoE" in shown.out


def test_an_interrupted_comparison_leaves_its_rows_and_goes_on(monkeypatch, tmp_path):
    cheap(monkeypatch)
    out, done, run_arm = tmp_path / "arms.json", [], compare_module.run_arm

    def interrupted(*job):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(job)
        return run_arm(*job)

    monkeypatch.setattr(compare_module, "run_arm", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare([DENSE, MOE], ["tokens"], [0, 1], preset=TINY, out=out)
    left = json.loads(out.read_text(encoding="utf-8"))
    assert [(row["seed"], row["arm"]) for row in left["rows"]] == [(0, "dense control"), (0, "upcycled MoE")]
    assert "upcycled MoE" in overview(left)

    before = runs(tmp_path)
    monkeypatch.setattr(compare_module, "run_arm", run_arm)
    result = compare([DENSE, MOE], ["tokens"], [0, 1], preset=TINY, out=out)
    assert len(result["rows"]) == 4
    after = runs(tmp_path)
    assert len(after) == 4 and after.items() >= before.items(), "what was there was loaded"
    assert json.loads(json.dumps(result["rows"][:2])) == left["rows"]


def test_a_failed_write_leaves_the_old_result(monkeypatch, tmp_path):
    cheap(monkeypatch)
    out = tmp_path / "arms.json"
    out.write_text("old")
    monkeypatch.setattr(compare_module, "describe", lambda *_: dict(bad={1, 2}))
    with pytest.raises(TypeError):
        compare([DENSE, MOE], ["tokens"], [0], preset=TINY, out=out)
    assert out.read_text() == "old"
