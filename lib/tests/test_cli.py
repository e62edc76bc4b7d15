"""The command line: what it prints, what it writes, and how it fails (one sentence, exit status 1 or 2)."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from real_models import TINY_LLAMA, difference
from safetensors.torch import load_file, save_file

transformers = pytest.importorskip("transformers")
from upcycling import cli  # noqa: E402
from upcycling.hf import inspection  # noqa: E402
from upcycling.hf.weight_files import WeightFiles  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A tiny Qwen3 (some layers may stay dense) without a tokenizer."""
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, pad_token_id=None, bos_token_id=None,
        eos_token_id=None, initializer_range=0.2,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("dense") / "qwen"
    transformers.Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def run(capsys):
    """Run a command in this process: (exit status, stdout, stderr)."""

    def run(*arguments):
        return cli.main([str(argument) for argument in arguments]), *capsys.readouterr()

    return run


def test_the_real_tiny_model_by_the_command_line_then_plain_transformers(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "upcycling",
        str(TINY_LLAMA),
        str(tmp_path / "moe"),
        "--experts",
        "8",
        "--top-k",
        "2",
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "LlamaForCausalLM -> MixtralForCausalLM: 8 experts" in done.stdout
    assert "the same function" in done.stdout and done.stdout.endswith(f"wrote {tmp_path / 'moe'}\n")
    dense, moe = (transformers.AutoModelForCausalLM.from_pretrained(path) for path in (TINY_LLAMA, tmp_path / "moe"))
    assert type(moe).__name__ == "MixtralForCausalLM"
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "moe")
    ids_BT = tokenizer("Tom and his dog went to the", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        a, b = dense(ids_BT).logits, moe(ids_BT).logits
    assert difference(a, b) <= 1e-5
    texts = [tokenizer.decode(m.generate(ids_BT, max_new_tokens=40, do_sample=False)[0]) for m in (dense, moe)]
    assert texts[0] == texts[1] and len(texts[0]) > 80


def test_options_reach_the_conversion(dense, tmp_path, run):
    options = "--experts 6 --top-k 3 --layers 1,3 --init noise --noise 0.01 --router-std 0.5 --dtype bfloat16 --seed 7"
    status, out, err = run(dense, tmp_path / "moe", *options.split(), "--no-verify", "--max-shard-size", "6e-5")
    assert (status, err) == (0, "")
    assert "not verified" in out
    config = json.loads((tmp_path / "moe/config.json").read_text())
    assert (config["num_experts"], config["num_experts_per_tok"], config["dtype"]) == (6, 3, "bfloat16")
    assert config["mlp_only_layers"] == [0, 2]
    record = json.loads((tmp_path / "moe/upcycling_receipt.json").read_text())["conversion"]
    expected = dict(num_experts=6, top_k=3, layers=[1, 3], init="noise", noise=0.01, router_std=0.5, seed=7)
    assert record == expected
    files = WeightFiles(tmp_path / "moe")
    assert len(files.files) > 2 and set(files.dtypes.values()) == {torch.bfloat16}
    routers = torch.stack([files[f"model.layers.{layer}.mlp.gate.weight"].float() for layer in (1, 3)])
    assert 0.4 < routers.std() < 0.6


@pytest.mark.parametrize("text,layers", [
    ("all", [0, 1, 2, 3]), ("even", [0, 2]), ("odd", [1, 3]), ("0,3", [0, 3]), ("1-3", [1, 2, 3]), ("0,2-3", [0, 2, 3]),
])  # fmt: skip
def test_layers(text, layers, dense, tmp_path, run):
    status, out, _ = run(dense, tmp_path / "moe", "--layers", text, "--dry-run")
    assert status == 0
    assert ("all layers" if text == "all" else f"layers {layers}") in out.splitlines()[0]


def test_a_dry_run_prints_the_plan_sizes_memory_and_disk_and_writes_nothing(dense, tmp_path, run):
    status, out, err = run(dense, tmp_path / "moe", "--dry-run")
    assert (status, err) == (0, "")
    assert "Qwen3ForCausalLM -> Qwen3MoeForCausalLM" in out and "norm_topk_prob=True" in out
    lines = {line.split()[0].rstrip(":"): line for line in out.splitlines() if line}
    assert "weight file" in lines["writes"] and "MB" in lines["writes"]
    assert "needed" in lines["disk"] and "free" in lines["disk"]
    assert "B to write" in lines["memory"] and "B to verify" in lines["memory"]
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_refuses_what_the_run_would_refuse(dense, tmp_path, run, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 5000})())
    status, out, err = run(dense, tmp_path / "moe", "--dry-run")
    assert status == 1 and "writes" in out
    assert err.startswith("error: ") and "5 kB free" in err


@pytest.mark.parametrize("arguments,status,message", [
    (["{dense}"], 2, "missing argument 'OUT'"),
    (["{dense}", "{out}", "--init", "magic"], 2, "'magic' is none of copy, noise"),
    (["{dense}", "{out}", "--experts", "many"], 2, "'many' is no whole number"),
    (["{dense}", "{out}", "--layers", "some"], 2, "0,2,4"),
    (["{dense}", "{out}", "--max-shard-size", "0"], 2, "above 0"),
    (["{dense}", "{out}", "--max-shard-size", "inf"], 2, "no finite number"),
    (["{dense}", "{out}", "--max-shard-size", "1e300"], 2, "no size in GB"),
    (["{dense}", "{out}", "--max-shard-size", "abc"], 2, "no finite number"),
    (["{dense}", "{out}", "--router-std", "nan"], 2, "no finite number"),
    (["{dense}", "{out}", "--init", "noise", "--noise", "inf"], 2, "no finite number"),
    (["{dense}", "{out}", "--layers", "0-1-2"], 2, "0,2,4-7"),
    (["{dense}", "{out}", "--layers", "3-1"], 2, "0,2,4-7"),
    (["{dense}", "{out}", "--layers", "0-99999999999999"], 2, "0,2,4-7"),
    (["{dense}", "{out}", "--experts", "1000000000"], 1, "more than 4096"),
    (["", "{out}"], 1, "name is empty"),
    (["{dense}", ""], 1, "no name for a new folder"),
    (["inspect", "{dense}", "--text", ""], 1, "text to route is empty"),
    (["inspect"], 2, "missing argument 'FOLDER'"),
    ([], 2, "a verb is missing"),
    (["{dense}", "{out}", "--expert", "4"], 2, "no such option: --expert"),
    (["convret", "{dense}", "{out}"], 2, "there is no verb 'convret'; convert is one"),
    (["inspect", "{dense}", "--text", "a", "--ids", "1"], 2, "give one of --text, --text-file and --ids"),
    (["continue", "{dense}", "{out}"], 2, "missing option '--steps'"),
    (["continue", "{dense}", "{out}", "--steps", "9", "--schedule", "flat"], 2, "'flat' is none of constant, cosine"),
    (["continue", "{dense}", "{out}", "--steps", "0"], 1, "steps=0"),
    (["compare", "--seeds", "0,x"], 2, "0,x is no list of seeds such as 0,1,2"),
    (["compare", "--budgets", "tokens,hours"], 2, "'hours' is none of tokens, FLOPs, seconds"),
    (["compare", "--preset", "huge"], 1, "choose one of quick, laptop"),
    (["select", "--fraction", "0"], 2, "above 0 and up to 1"),
    (["bench", "--rounds", "2.5"], 2, "'2.5' is no whole number"),
    (["inspect", "{dense}", "--ids", "a,b"], 2, "5,17,3"),
    (["{dense}", "{out}", "--top-k", "9"], 1, "choose 1..8"),
    (["{dense}", "{out}", "--layers", "0,9"], 1, "choose some of 0..3"),
    (["{dense}", "{dense}"], 1, "not empty"),
    (["{out}/nowhere", "{out}"], 1, "there is no folder"),
    (["inspect", "{out}/nowhere"], 1, "there is no folder"),
    (["inspect", "{dense}"], 1, "no MoE layer"),
    (["inspect", "{dense}", "--text-file", "{out}/nowhere"], 1, "nowhere"),
])  # fmt: skip
def test_errors_are_one_sentence_with_an_exit_status(arguments, status, message, dense, tmp_path, run):
    filled = [argument.format(dense=dense, out=tmp_path / "moe") for argument in arguments]
    got, _, err = run(*filled)
    assert got == status
    assert message in err and "Traceback" not in err
    assert err.startswith("error: ") and err.count("\n") == 1
    assert status == 1 or "--help shows what it takes" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_has_examples_and_fits_80_columns(verb, run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    status, out, err = run(verb, "--help")
    assert (status, err) == (0, "")
    assert f"python -m upcycling {verb} " in out.split("examples:")[1]
    assert max(map(len, out.splitlines())) <= 80 and "│" not in out
    assert verb in run("--help")[1] and run("-h") == run("--help")


def test_help_comes_without_the_heavy_libraries():
    """What a verb needs is imported when it runs; help in a fraction of a second depends on it."""
    script = (
        "import sys; from upcycling import cli; cli.main(sys.argv[1:]); print([m for m in HEAVY if m in sys.modules])"
    )
    heavy = ("torch", "transformers", "numpy", "datasets", "rich")
    for arguments in (["--help"], ["continue", "--help"], ["compare", "--seeds", "x"]):
        command = [sys.executable, "-c", script.replace("HEAVY", str(heavy)), *arguments]
        assert subprocess.run(command, capture_output=True, text=True).stdout.splitlines()[-1] == "[]"


def test_every_command_that_is_printed_is_understood(run):
    """In README and in notebooks: its verb, or its former module, and each of its options."""
    texts = [ROOT / "README.md", *(ROOT / "notebooks").glob("*.ipynb")]
    text = "\n".join(path.read_text(encoding="utf-8") for path in texts)
    commands = re.findall(r"python -m upcycling(?:\.(\w+))?((?: +[\w./{}-]+)*)", text)
    assert len(commands) > 15
    old = {"compare": "compare", "continued": "continue", "knockouts": "knockouts", "selected": "select"}
    for module, words in commands:
        words = words.split()
        verb = old.get(module, module) or (words[0] if words and words[0] in cli.VERBS else "convert")
        shown = run(verb, "--help")[1]
        assert all(word in shown for word in words if word.startswith("--")), (module, words)


def test_choices_are_those_of_the_library():
    from upcycling.cli import studies
    from upcycling.experiments.arms import ARM_SETS
    from upcycling.experiments.budgets import BUDGETS

    assert tuple(ARM_SETS) == studies.ARMS and studies.BUDGETS == BUDGETS


@pytest.mark.parametrize("typed,read", [
    ("compare --seeds 0 1 2 --workers 2", "compare --seeds 0,1,2 --workers 2"),
    ("compare --budgets tokens FLOPs --seeds 3", "compare --budgets tokens,FLOPs --seeds 3"),
    ("compare --seeds 0,1 --out a.json", "compare --seeds 0,1 --out a.json"),
    ("A B --seed 3", "A B --seed 3"),
])  # fmt: skip
def test_lists_may_be_typed_with_blanks_as_before(typed, read):
    assert cli.with_commas(typed.split()) == read.split()


def test_the_first_spelling_is_convert(dense, tmp_path, run):
    old = run(dense, tmp_path / "moe", "--layers", "even", "--dry-run")
    assert old == run("convert", dense, tmp_path / "moe", "--layers", "even", "--dry-run")
    assert run("--dry-run", "--layers", "even", dense, tmp_path / "moe") == old and old[0] == 0


@pytest.mark.parametrize("module,verb", [
    ("compare", "compare"), ("continued", "continue"), ("knockouts", "knockouts"), ("selected", "select"),
    ("bench", "bench"),
])  # fmt: skip
def test_modules_that_were_commands_are_their_verbs(module, verb):
    """Notebooks print them."""
    command = [sys.executable, "-m", f"upcycling.{module}", "--seeds", "0", "1", "--rounds", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and f"python -m upcycling {verb} --help" in done.stderr


# ------------------------------------------------------------------------------------------------------------- inspect


@pytest.fixture(scope="module")
def moe(dense, tmp_path_factory):
    folder = tmp_path_factory.mktemp("moe") / "moe"
    assert cli.main([str(dense), str(folder), "--experts", "4", "--layers", "1-3", "--router-std", "1"]) == 0
    return folder


def test_inspect_prints_parameters_router_settings_and_receipt(moe, run):
    status, out, err = run("inspect", moe)
    assert (status, err) == (0, "")
    lines = {line.split()[0]: line for line in out.splitlines()}
    model = transformers.AutoModelForCausalLM.from_pretrained(moe)
    total = sum(p.numel() for p in model.parameters())
    active = total - 3 * (4 - 2) * 3 * 32 * 48  # 3 layers, 2 of 4 experts idle, 3 matrices
    assert f"{total:,}, {active:,} of them active" in lines["parameters"]
    assert "Qwen3MoeForCausalLM" in lines["class"]
    assert "Qwen3MoeTopKRouter, top-2 of 4 experts" in lines["router"]
    assert "norm_topk_prob=True" in lines["settings"]
    assert "made from qwen: the same function" in lines["receipt"]
    assert "no tokenizer; give token ids with --ids" in out


def test_inspect_checks_the_routing_on_ids(moe, run):
    ids = ",".join(str(i % 61) for i in range(200))
    status, out, _ = run("inspect", moe, "--ids", ids)
    assert status == 0 and "200 tokens, top-2 of 4 experts" in out
    assert [line.split()[0] for line in out.splitlines() if line.split()[0].isdigit()][:3] == ["1", "2", "3"]
    assert "ALARM" not in out
    status, _, err = run("inspect", moe, "--ids", "5,61")
    assert status == 1 and "61 is not in 0..60" in err
    status, _, err = run("inspect", moe, "--text", "hello")
    assert status == 1 and "no tokenizer" in err and "--ids" in err


def test_inspect_raises_the_alarm_for_a_collapsed_layer(moe, tmp_path, run):
    shutil.copytree(moe, tmp_path / "moe")
    model = transformers.AutoModelForCausalLM.from_pretrained(moe)
    with torch.no_grad():
        model.model.layers[2].mlp.gate.weight.zero_()  # all tie: every token takes the same two experts
    model.save_pretrained(tmp_path / "moe")
    _, out, _ = run("inspect", tmp_path / "moe", "--ids", ",".join(str(i % 61) for i in range(200)))
    assert "ALARM: layer 2 collapsed" in out


def test_inspect_says_when_a_model_is_too_large_to_load(moe, run, monkeypatch):
    monkeypatch.setattr(inspection.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    status, out, _ = run("inspect", moe, "--ids", "1,2,3")
    assert status == 0 and "routing not checked: the model takes" in out and "1 kB" in out


def test_inspect_without_or_with_a_damaged_receipt(moe, tmp_path, run):
    shutil.copytree(moe, tmp_path / "moe")
    for damaged in ("{", "[]", "null", '{"verified": true}', "[" * 50_000):
        (tmp_path / "moe/upcycling_receipt.json").write_text(damaged)
        assert "cannot be read" in run("inspect", tmp_path / "moe")[1]
    (tmp_path / "moe/upcycling_receipt.json").unlink()
    assert "none: the folder was not made" in run("inspect", tmp_path / "moe")[1]


@pytest.mark.parametrize("spoil,message", [
    (lambda tensors, config: tensors.pop("model.layers.2.mlp.gate.weight"), "layers.2.mlp.gate.weight is missing"),
    (lambda tensors, config: tensors.update(extra=torch.zeros(1)), "extra is in the weights but no part of the model"),
    (lambda tensors, config: config.update(num_experts=3, num_local_experts=3), "has another shape in the weights"),
    (lambda tensors, config: config.update(num_experts_per_tok=9), "the top 9 of 4 experts"),
    (lambda tensors, config: config.update(num_attention_heads=0), "moe"),
])  # fmt: skip
def test_inspect_does_not_judge_routers_that_are_not_there(spoil, message, moe, tmp_path, run):
    folder = tmp_path / "moe"
    shutil.copytree(moe, folder)
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    spoil(tensors, config)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    status, out, err = run("inspect", folder, "--ids", ",".join(["1,2,3"] * 30))
    assert status == 1 and message in err and err.count("\n") == 1
    assert "effective" not in out


def test_inspect_prints_no_control_characters_of_others(moe, tmp_path, run):
    shutil.copytree(moe, tmp_path / "moe")
    (tmp_path / "moe/upcycling_receipt.json").write_text(
        json.dumps({"verified": False, "base_model": "\x1b[2J\nreceipt     faked"})
    )
    status, out, _ = run("inspect", tmp_path / "moe")
    assert status == 0 and r"made from \u{1B}[2J\u{A}receipt     faked" in out
    tensors = {"\x1b[2Jevil": torch.zeros(1), **load_file(moe / "model.safetensors")}
    save_file(tensors, tmp_path / "moe/model.safetensors", metadata={"format": "pt"})
    status, _, err = run("inspect", tmp_path / "moe", "--ids", "1,2,3")
    assert status == 1 and r"\u{1B}[2Jevil is in the weights but no part of the model" in err


def test_inspect_reads_text_with_the_tokenizer(tmp_path, run):
    assert run(TINY_LLAMA, tmp_path / "moe", "--experts", "4", "--no-verify")[0] == 0
    _, default, _ = run("inspect", tmp_path / "moe")
    assert "tokens, top-2 of 4 experts" in default and "pooled" in default
    (tmp_path / "text").write_text("Once upon a time there was a dog.")
    _, from_file, _ = run("inspect", tmp_path / "moe", "--text-file", tmp_path / "text")
    _, direct, _ = run("inspect", tmp_path / "moe", "--text", "Once upon a time there was a dog.")
    assert direct == from_file != default
    assert "not verified" in direct
