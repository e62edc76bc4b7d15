"""The door to the kernels: tried, measured, shut, deleted; and what is left of each private name of torch."""

import json
import logging
import os
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from upcycling.kernels import choice

LIBRARY = Path(__file__).resolve().parents[2] / "upcycling"
ONEDNN = "torch.ops.mkldnn = types.SimpleNamespace(_linear_pointwise=lambda {}: x)"
NAMES = {  # private name -> how it is taken away
    "_disable_dynamo": """
name = torch._disable_dynamo  # torch itself cannot do without: it is gone only while the library looks for it
del torch._disable_dynamo
import upcycling
package = sys.modules["upcycling.kernels"] = types.ModuleType("upcycling.kernels")
package.__path__ = [upcycling.__path__[0] + "/kernels"]
import upcycling.kernels.private
torch._disable_dynamo = name
del sys.modules["upcycling.kernels"]
""",
    "WeakTensorKeyDictionary": "import torch.utils.weak; del torch.utils.weak.WeakTensorKeyDictionary",
    "_linear_pointwise": "torch.ops.mkldnn = types.SimpleNamespace()",
    "_linear_pointwise, another signature": ONEDNN.format("x, w"),
    "_linear_pointwise, other numbers": ONEDNN.format("x, *others"),
    "_storage_Use_Count": "del torch._C._storage_Use_Count",
}
WORK = """
import logging, sys, types
logging.basicConfig(level=logging.WARNING)
import torch
{before}
import upcycling
from upcycling import DecoderLM, ModelConfig, MoEConfig, check_equivalence, upcycle
torch.manual_seed(0)
sizes = dict(vocab_size=64, d_model=256, n_layers=1, n_heads=2, d_ff=256, seq_len=16)
dense = DecoderLM(ModelConfig.smol(**sizes)).eval()
moe = upcycle(dense, MoEConfig(num_experts=4, top_k=2))
ids_BT = torch.randint(64, (4, 17))
report = check_equivalence(dense, moe, ids_BT[:, :-1])
assert report.max_abs_diff <= 1e-5 * max(1.0, float(dense(ids_BT[:, :-1]).logits_BTV.abs().max())), report
moe.train()
before = moe(ids_BT[:, :-1], ids_BT[:, 1:]).loss
moe.objective(moe(ids_BT[:, :-1], ids_BT[:, 1:])).backward()
torch.optim.SGD(moe.parameters(), lr=0.5).step()
assert moe(ids_BT[:, :-1], ids_BT[:, 1:]).loss < before
upcycling.generate(moe, ids_BT[:1, :3], 3)
{after}
"""


def run(before="", after="", **environment):
    """(standard output, the lines of the log) of a training step, the equivalence check and a few tokens."""
    code = WORK.format(before=before, after=after)
    environment = os.environ | {"PYTHONPATH": str(LIBRARY.parent), "OMP_NUM_THREADS": "1"} | environment
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout, [line for line in result.stderr.splitlines() if ":upcycling.kernels:" in line]


@pytest.mark.parametrize("name", NAMES)
def test_without_one_private_name_everything_works(name, tmp_path):
    _, log = run(NAMES[name], XDG_CACHE_HOME=str(tmp_path))
    said = [line for line in log if name.split(",")[0] in line]
    assert len(said) >= 1 and "is not used: this torch" in said[0], "a sentence says so"


def test_private_names_of_torch_stand_in_one_file():
    private = re.compile(r"\btorch(\.\w+)*\._(?!_)\w+|\.mkldnn\._|_python_dispatch|utils\.weak")
    found = {
        str(path.relative_to(LIBRARY))
        for path in LIBRARY.rglob("*.py")
        if any(private.search(line.split("#")[0]) for line in path.read_text(encoding="utf-8").splitlines())
    }
    assert found == {"kernels/private.py"}


def test_importing_the_core_does_not_load_the_compiler():
    code = "import sys, torch; before = {*sys.modules}; import upcycling.core.model; print({*sys.modules} - before)"
    environment = os.environ | {"PYTHONPATH": str(LIBRARY.parent)}
    loaded = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "upcycling.kernels.private" in loaded.stdout and "torch._dynamo" not in loaded.stdout


def test_the_core_works_without_the_folder(tmp_path):
    missing = """
    class Missing:
        def find_spec(self, name, path=None, target=None):
            if name.startswith("upcycling.kernels"):
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    sys.meta_path.insert(0, Missing())
    """
    core = textwrap.dedent(missing) + "import upcycling.core.model, upcycling.training.loop"
    after = "assert not [name for name in sys.modules if name.startswith('upcycling.kernels')]"
    code = WORK.format(before=core, after=after).replace("upcycling.generate(moe, ids_BT[:1, :3], 3)", "")
    environment = os.environ | {"PYTHONPATH": str(LIBRARY.parent), "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]


def test_the_switch_shuts_the_door(tmp_path):
    after = "from upcycling.kernels import choice, faster; print(choice._taken, faster('linear', ids_BT, None))"
    out, log = run(after=after, UPCYCLING_KERNELS="0", XDG_CACHE_HOME=str(tmp_path))
    assert out.split() == ["{}", "None"] and not log and not list(tmp_path.iterdir()), "nothing is even measured"


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """Nothing is known of this machine yet."""
    monkeypatch.setattr(choice, "_taken", {})
    monkeypatch.setattr(choice, "ON", True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "upcycling" / "kernels.json"


def race(ours, theirs, asked):
    def work(seconds):
        def busy():
            end = time.process_time() + seconds
            while time.process_time() < end:
                pass

        return busy

    def start():
        asked.append(1)
        return work(ours), work(theirs)

    return start


@pytest.mark.parametrize(
    ("ours", "theirs", "taken"), [(0.001, 0.004, True), (0.004, 0.001, False), (0.002, 0.002, False)]
)
def test_a_kernel_is_taken_only_where_it_is_faster_and_measured_once(fresh, monkeypatch, ours, theirs, taken):
    asked = []
    kernel = choice.Kernel("a test's", race(ours, theirs, asked))
    assert kernel.taken() is taken and kernel.taken() is taken and len(asked) == 1
    (answers,) = json.loads(fresh.read_text()).values()
    assert answers == {"a test's": taken}
    choice._taken.clear()  # another process
    assert kernel.taken() is taken and len(asked) == 1, "the file knows"
    monkeypatch.setattr(choice, "_processor", lambda: "another processor")
    choice._taken.clear()
    assert kernel.taken() is taken and len(asked) == 2, "another machine measures by itself"
    assert len(json.loads(fresh.read_text())) == 2


@pytest.mark.parametrize("content", ["", "[1]", "{broken", '{"k": 3}'])
def test_a_damaged_record_is_measured_anew(fresh, content, monkeypatch):
    monkeypatch.setattr(choice, "_key", lambda: "k")
    fresh.parent.mkdir()
    fresh.write_text(content)
    assert choice.Kernel("a test's", race(0.001, 0.004, [])).taken()
    assert json.loads(fresh.read_text())["k"] == {"a test's": True}


def test_where_nothing_can_be_written_it_is_measured_all_the_same(fresh):
    fresh.parent.parent.joinpath("upcycling").write_text("a file is in the way")
    assert choice.Kernel("a test's", race(0.001, 0.004, [])).taken()


def test_what_does_not_run_here_is_not_taken_and_says_so_once(fresh, caplog):
    def broken():
        raise RuntimeError("no such product")

    kernel = choice.Kernel("a test's", broken)
    with caplog.at_level(logging.WARNING):
        assert not kernel.taken() and not kernel.taken()
    (line,) = caplog.messages
    assert "a test's is not used" in line and "no such product" in line
    assert not fresh.exists(), "the next release may run it"


def test_measuring_draws_no_random_numbers(fresh):
    before = torch.random.get_rng_state()
    choice.Kernel("a test's", lambda: (lambda: torch.randn(3), lambda: torch.randn(3))).taken()
    assert torch.equal(torch.random.get_rng_state(), before)
