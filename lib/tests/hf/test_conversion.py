"""The streaming conversion: the same tensors as in memory; atomic, resumable, verified; in the memory of a layer."""

import json
import os
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from real_models import TINY_LLAMA, tolerance
from safetensors import safe_open
from safetensors.torch import load_file, save_file

transformers = pytest.importorskip("transformers")
import yaml  # noqa: E402

from upcycling.hf import convert as conversion, weight_files  # noqa: E402
from upcycling.hf.convert import convert, prepare  # noqa: E402
from upcycling.hf.families.engine import hub_tensors  # noqa: E402
from upcycling.hf.layerwise import layerwise_logits  # noqa: E402
from upcycling.hf.output.partial import sha256  # noqa: E402
from upcycling.hf.sources import open_source  # noqa: E402
from upcycling.hf.upcycle_pretrained import upcycle_pretrained  # noqa: E402
from upcycling.hf.weight_files import WeightFiles  # noqa: E402

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
E = 4
BASE = dict(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, pad_token_id=None, bos_token_id=None, eos_token_id=None,
)  # fmt: skip
# One for each way that a target tensor is made: as it is, tied, stacked over experts, new, split, and computed.
KINDS = {
    "llama": {}, "tied": dict(model_type="llama", tie_word_embeddings=True), "granite": {}, "qwen2": {}, "phi3": {},
    "gemma": dict(hidden_act="gelu_pytorch_tanh"),
    "qwen3": dict(
        layer_types=["full_attention", "sliding_attention", "full_attention"], use_sliding_window=True, sliding_window=5
    ),
}  # fmt: skip


def dense_model(kind="llama", dtype=torch.float32, **changes):
    values = {**BASE, "model_type": kind, **KINDS[kind], **changes}
    config = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    model = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype).eval()


def saved(tmp_path, kind="llama", name="dense", max_shard_size="20KB", **changes):
    """A folder with a dense model in several weight files."""
    dense_model(kind, **changes).save_pretrained(tmp_path / name, max_shard_size=max_shard_size)
    return tmp_path / name


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("llama"))


def quick(source, out, experts=E, top_k=2, **options):
    """A conversion into several files, without a progress bar, not verified unless asked for."""
    options = dict(verify=False, progress=False, max_shard_size=60_000) | options
    return convert(source, out, experts, top_k, **options)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def loads(folder):
    try:
        transformers.AutoModelForCausalLM.from_pretrained(folder)
    except (OSError, ValueError):
        return False
    return True


@torch.no_grad()
def logits(model, ids_BT):
    return model(input_ids=ids_BT, use_cache=False).logits


# ------------------------------------------------------------------------------------------------------ what is written


@pytest.mark.parametrize("kind", KINDS)
def test_streaming_gives_the_tensors_of_the_model_in_memory(kind, tmp_path):
    source = saved(tmp_path, kind)
    quick(source, tmp_path / "moe", router_std=0.3, seed=3)
    written = WeightFiles(tmp_path / "moe")
    expected = hub_tensors(upcycle_pretrained(source, E, 2, router_std=0.3, seed=3))
    assert set(written.names) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(written[name], tensor) and written[name].dtype == tensor.dtype, name


@pytest.mark.parametrize("options", [dict(init="noise"), dict(dtype=torch.bfloat16), dict(layers=[0, 2])], ids=str)
def test_streaming_equals_memory_with_other_options(options, tmp_path):
    source = saved(tmp_path, "qwen2")
    quick(source, tmp_path / "moe", **options)
    expected = hub_tensors(upcycle_pretrained(source, E, 2, **options))
    written = load_file_of(tmp_path / "moe")
    assert set(written) == set(expected)
    assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())


def load_file_of(folder):
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def test_the_files_are_standard_safetensors_with_an_index_and_hub_names(llama, tmp_path):
    quick(llama, tmp_path / "moe", max_shard_size=60_000)
    files = sorted((tmp_path / "moe").glob("*.safetensors"))
    assert len(files) > 3
    index = json.loads((tmp_path / "moe/model.safetensors.index.json").read_text())
    for i, path in enumerate(files, 1):
        assert path.name == f"model-{i:05d}-of-{len(files):05d}.safetensors"
        assert path.stat().st_size < 60_000 + 10_000  # the header comes on top
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}  # without it transformers refuses the file
            assert {name for name, where in index["weight_map"].items() if where == path.name} == set(file.keys())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in load_file_of(tmp_path / "moe").values())
    names = index["weight_map"]
    assert {f"model.layers.2.block_sparse_moe.experts.3.w{i}.weight" for i in (1, 2, 3)} < set(names)
    assert "model.layers.0.block_sparse_moe.gate.weight" in names


def test_both_names_of_the_number_of_experts_are_in_the_configuration(tmp_path):
    quick(saved(tmp_path, "qwen3", layer_types=["full_attention"] * 3), tmp_path / "moe", 6, 3)
    config = json.loads((tmp_path / "moe/config.json").read_text())
    assert config["architectures"] == ["Qwen3MoeForCausalLM"]
    assert config["num_experts"] == config["num_local_experts"] == 6
    assert config["num_experts_per_tok"] == 3
    assert config["norm_topk_prob"] is True and config["output_router_logits"] is True


def test_mixed_types_keep_theirs(tmp_path):
    source = saved(tmp_path, max_shard_size="1GB")
    tensors = load_file(source / "model.safetensors")
    mixed = {name: t if "norm" in name else t.bfloat16() for name, t in tensors.items()}
    save_file(mixed, source / "model.safetensors", metadata={"format": "pt"})
    quick(source, tmp_path / "moe", max_shard_size=10**9)
    written = load_file(tmp_path / "moe/model.safetensors")
    assert written["model.norm.weight"].dtype == torch.float32
    assert written["model.layers.1.block_sparse_moe.experts.2.w2.weight"].dtype == torch.bfloat16


def test_wide_types_come_first_in_a_file():
    """So that a tensor begins at a multiple of its element size although an odd number of small ones precedes it."""
    sizes = [(torch.bfloat16, 6), (torch.float32, 8), (torch.bfloat16, 4), (torch.float64, 8)]
    tensors = [SimpleNamespace(name=str(i), dtype=dtype, bytes=size) for i, (dtype, size) in enumerate(sizes)]
    (shard,) = conversion.plan_shards(tensors, 10**6)
    assert [entry.dtype.itemsize for entry in shard.entries] == [8, 4, 2, 2]
    many = conversion.plan_shards(tensors, 14)
    assert [[entry.bytes for entry in shard.entries] for shard in many] == [[8, 6], [8, 4]]


def test_what_lies_beside_the_weights_comes_along(llama, tmp_path):
    source = tmp_path / "dense"
    shutil.copytree(llama, source)
    companions = {
        "generation_config.json": '{"temperature": 0.7}', "tokenizer.json": "{}", "tokenizer_config.json": "{}",
        "special_tokens_map.json": "{}", "chat_template.jinja": "{{ messages }}", "LICENSE": "mine",
        "additional_chat_templates/tool.jinja": "{{ tools }}",
    }  # fmt: skip
    left_behind = {"README.md": "old card", "pytorch_model.bin": "x", "modeling_own.py": "x", "events.log": "x"}
    (source / "additional_chat_templates").mkdir()
    for name, text in {**companions, **left_behind}.items():
        (source / name).write_text(text)
    quick(source, tmp_path / "moe")
    written = contents(tmp_path / "moe")
    assert {name: written[name].decode() for name in companions} == companions
    own = {"README.md", "config.json", "upcycling_receipt.json", "model.safetensors.index.json"}
    assert {name for name in written if not name.endswith(".safetensors")} == own | set(companions)
    assert b"old card" not in written["README.md"]


def test_a_model_with_nothing_beside_its_weights(llama, tmp_path):
    source = tmp_path / "dense"
    shutil.copytree(llama, source)
    (source / "generation_config.json").unlink()
    assert convert(source, tmp_path / "moe", E, 2, progress=False).greedy_equal
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    assert model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=3, do_sample=False).shape == (1, 6)


def test_receipt_and_model_card(llama, tmp_path):
    receipt = convert(llama, tmp_path / "moe", E, 2, progress=False)
    record = json.loads((tmp_path / "moe/upcycling_receipt.json").read_text())
    assert record["verified"] and record["passed"] and receipt.passed
    assert record["max_abs_diff"] == receipt.max_abs_diff <= record["tolerance"]
    assert (record["source"], record["target"]) == ("LlamaForCausalLM", "MixtralForCausalLM")
    assert record["conversion"]["num_experts"] == E and record["settings"]["num_experts_per_tok"] == 2
    assert record["versions"]["transformers"] == transformers.__version__
    digests = {path.name: sha256(path) for path in (tmp_path / "moe").glob("*.safetensors")}
    assert record["weights"] == digests
    _, front, body = (tmp_path / "moe/README.md").read_text().split("---\n", 2)
    front = yaml.safe_load(front)
    assert front["library_name"] == "transformers" and {"moe", "upcycled"} <= set(front["tags"])
    assert "base_model" not in front  # a folder has no name that others know
    assert f"{receipt.max_abs_diff:.1e}" in body and "AutoModelForCausalLM.from_pretrained" in body
    assert "pools all layers" in body
    assert str(tmp_path) not in (tmp_path / "moe/README.md").read_text() + json.dumps(record)


def test_unverified_says_so(llama, tmp_path):
    assert quick(llama, tmp_path / "moe") is None
    record = json.loads((tmp_path / "moe/upcycling_receipt.json").read_text())
    assert record["verified"] is False and "max_abs_diff" not in record
    assert "not compared" in (tmp_path / "moe/README.md").read_text()


# ------------------------------------------------------------------------------------------- killed, and run once more


def killed(function, **patches):
    """Run `function` in a process that is killed with signal 9 where the patches say so; True if it was."""
    process = os.fork()
    if process == 0:
        torch.set_num_threads(1)  # a fork has none of the threads that torch would wait for
        try:
            for name, value in patches.items():
                setattr(conversion, name, value)
            function()
        finally:
            os._exit(0)
    _, status = os.waitpid(process, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def die(*_args, **_options):
    os.kill(os.getpid(), signal.SIGKILL)


class BarThatKills:
    """A progress bar that kills the process at its `n`-th update."""

    def __init__(self, n):
        self.left = n

    def __call__(self, *_):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def update(self, _):
        self.left -= 1
        if self.left == 0:
            die()


POINTS = {
    "in the first file": lambda: dict(_bar=BarThatKills(3)),
    "in a later file": lambda: dict(_bar=BarThatKills(40)),
    "while comparing": lambda: dict(verify_models=die),
    "at the card": lambda: dict(model_card=die),
}


@needs_fork
@pytest.mark.parametrize("point", POINTS)
def test_killed_anywhere_nothing_loads_and_the_next_run_completes_it(point, llama, tmp_path):
    def run(out):
        return convert(llama, out, E, 2, progress=False, max_shard_size=60_000)

    assert killed(lambda: run(tmp_path / "moe"), **POINTS[point]())
    assert not (tmp_path / "moe").exists()
    left = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert [path.name for path in left] == ["moe.partial"]
    assert not loads(left[0])
    finished = json.loads((left[0] / "conversion.json").read_text())["shards"]
    inodes = {name: (left[0] / name).stat().st_ino for name in finished}
    assert bool(finished) == (point != "in the first file")
    run(tmp_path / "moe")
    assert {name: (tmp_path / "moe" / name).stat().st_ino for name in finished} == inodes  # not written again
    assert not left[0].exists()
    run(tmp_path / "straight")
    assert contents(tmp_path / "moe") == contents(tmp_path / "straight")
    assert loads(tmp_path / "moe")


@needs_fork
@pytest.mark.parametrize("change", [dict(seed=1), dict(experts=2), dict(dtype=torch.bfloat16)], ids=str)
def test_other_settings_start_clean(change, llama, tmp_path):
    assert killed(lambda: quick(llama, tmp_path / "moe"), model_card=die)
    quick(llama, tmp_path / "moe", **change)
    quick(llama, tmp_path / "straight", **change)
    assert contents(tmp_path / "moe") == contents(tmp_path / "straight")


@needs_fork
def test_another_source_starts_clean(llama, tmp_path):
    source = tmp_path / "dense"
    shutil.copytree(llama, source)
    assert killed(lambda: quick(source, tmp_path / "moe"), model_card=die)
    dense_model(rms_norm_eps=1e-6).save_pretrained(source, max_shard_size="20KB")
    quick(source, tmp_path / "moe")
    assert json.loads((tmp_path / "moe/config.json").read_text())["rms_norm_eps"] == 1e-6


@needs_fork
def test_a_finished_file_that_was_damaged_is_written_again(llama, tmp_path):
    assert killed(lambda: quick(llama, tmp_path / "moe"), model_card=die)
    damage(next((tmp_path / "moe.partial").glob("*.safetensors")))
    quick(llama, tmp_path / "moe")
    quick(llama, tmp_path / "straight")
    assert contents(tmp_path / "moe") == contents(tmp_path / "straight")


def damage(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


# ------------------------------------------------------------------------------------------------------- verification


def test_a_small_model_is_loaded_and_a_large_one_compared_layer_by_layer(llama, tmp_path, monkeypatch):
    whole = convert(llama, tmp_path / "whole", E, 2, progress=False)
    monkeypatch.setattr(conversion, "VERIFY_MEMORY", 0)
    layered = convert(llama, tmp_path / "layered", E, 2, progress=False)
    assert "with cache" in whole.checks and whole.greedy_equal is True
    assert list(layered.checks) == ["layer by layer"] and layered.greedy_equal is None
    assert any("layer by layer, because both models" in note for note in layered.notes)
    assert (
        whole.passed
        and layered.passed
        and 0 < layered.max_abs_diff <= tolerance(logits(dense_model(), torch.arange(61)[None]))
    )


@pytest.mark.parametrize("kind", KINDS)
def test_layer_by_layer_gives_the_models_logits(kind, tmp_path):
    source = saved(tmp_path, kind)
    config = transformers.AutoConfig.from_pretrained(source)
    ids_BT = torch.randint(BASE["vocab_size"], (2, 12), generator=torch.Generator().manual_seed(1))
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    expected = logits(model, ids_BT)[..., ids_BT.unique()]
    assert torch.allclose(layerwise_logits(WeightFiles(source), config, ids_BT), expected, atol=1e-6)
    quick(source, tmp_path / "moe", layers=[1] if kind in ("qwen2", "qwen3") else None)
    moe, files = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "moe"), WeightFiles(tmp_path / "moe")
    expected = logits(moe, ids_BT)[..., ids_BT.unique()]
    assert torch.allclose(layerwise_logits(files, moe.config, ids_BT), expected, atol=1e-6)


@pytest.mark.parametrize("memory", [2e9, 0], ids=["whole", "layer by layer"])
@pytest.mark.parametrize("kind,break_it", [
    ("llama", lambda config: config.rope_parameters.update(rope_theta=500.0)),
    ("qwen2", lambda config: setattr(config, "norm_topk_prob", False)),
])  # fmt: skip
def test_another_function_is_refused_and_leaves_nothing_that_loads(kind, break_it, memory, tmp_path, monkeypatch):
    monkeypatch.setattr(conversion, "VERIFY_MEMORY", memory)
    job = prepare(saved(tmp_path, kind), tmp_path / "moe", E, 2)
    break_it(job.plan.config)
    with pytest.raises(ValueError, match=r"NOT the same function.*moe.partial"):
        job.run(progress=False)
    assert not (tmp_path / "moe").exists() and not loads(tmp_path / "moe.partial")


def test_bytes_that_are_not_those_written_are_noticed(llama, tmp_path, monkeypatch):
    write = conversion.write_companions

    def write_and_damage(job):
        write(job)
        damage(job.partial / job.shards[0].file)

    monkeypatch.setattr(conversion, "write_companions", write_and_damage)
    with pytest.raises(OSError, match="not read back"):
        convert(llama, tmp_path / "moe", E, 2, progress=False)


def test_noise_is_reported_not_refused(llama, tmp_path):
    receipt = convert(llama, tmp_path / "moe", E, 2, init="noise", progress=False)
    assert not receipt.passed and any("noise" in note for note in receipt.notes)
    assert loads(tmp_path / "moe")


def test_weights_that_have_to_be_changed_do_not_fit_in_half_precision_and_the_remedy_works(tmp_path):
    source = saved(tmp_path, "gemma", dtype=torch.bfloat16)  # its norms multiply by 1 + weight, a Mixtral's by weight
    with pytest.raises(ValueError, match="bfloat16 rounds them: convert to dtype float32"):
        convert(source, tmp_path / "moe", E, 2, progress=False)
    receipt = convert(source, tmp_path / "moe", E, 2, dtype=torch.float32, progress=False)
    assert receipt.max_abs_diff <= tolerance(logits(dense_model("gemma"), torch.arange(61)[None]))


def test_half_precision_is_compared_with_the_dense_model_at_the_same_precision(llama, tmp_path, monkeypatch):
    for memory in (2e9, 0):
        monkeypatch.setattr(conversion, "VERIFY_MEMORY", memory)
        receipt = convert(llama, tmp_path / f"moe{memory}", E, 2, dtype=torch.bfloat16, progress=False)
        assert receipt.passed and receipt.max_abs_diff <= tolerance(logits(dense_model(), torch.arange(61)[None]))


# ------------------------------------------------------------------------------------------------------------ refusals


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(llama, tmp_path, monkeypatch):
    needed = prepare(llama, tmp_path / "moe", E, 2).needed
    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda _: SimpleNamespace(free=needed - 1))
    with pytest.raises(OSError, match=r"needs .* has .* free"):
        quick(llama, tmp_path / "moe", max_shard_size=conversion.MAX_SHARD_SIZE)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda _: SimpleNamespace(free=needed))
    quick(llama, tmp_path / "moe", max_shard_size=conversion.MAX_SHARD_SIZE)
    assert needed >= sum(path.stat().st_size for path in (tmp_path / "moe").iterdir()) > needed - 2**20


@pytest.mark.parametrize("change,message", [
    (dict(experts=0), "choose 1"), (dict(top_k=0), r"top_k=0.*choose 1\.\.4"), (dict(top_k=5), r"choose 1\.\.4"),
    (dict(layers=[0, 3]), r"choose some of 0\.\.2"), (dict(layers=[]), "choose some of"),
    (dict(init="drop"), "'copy', 'noise'"), (dict(router_std=-1.0), "cannot be negative"),
    (dict(layers=[0]), "no dense layers"),
])  # fmt: skip
def test_settings_out_of_range_are_refused_before_anything_is_written(change, message, llama, tmp_path):
    with pytest.raises(ValueError, match=message):
        quick(llama, tmp_path / "moe", **change)
    assert list(tmp_path.iterdir()) == []


def test_folders_in_the_way_are_refused(llama, tmp_path):
    out = tmp_path / "moe"
    out.mkdir()
    (out / "precious").write_text("x")
    with pytest.raises(FileExistsError, match="not empty"):
        quick(llama, out)
    with pytest.raises(FileExistsError, match="not empty"):
        quick(llama, llama)
    (out / "precious").unlink()
    partial = tmp_path / "moe.partial"
    partial.mkdir()
    (partial / "precious").write_text("x")
    with pytest.raises(FileExistsError, match="in the way"):
        quick(llama, out)
    assert (partial / "precious").read_text() == "x"
    (partial / "precious").unlink()
    quick(llama, out)  # both empty now
    assert loads(out)


def test_places_that_cannot_become_a_folder_are_refused_before_anything_is_written(llama, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "a.partial").symlink_to(tmp_path)
    (tmp_path / "b.partial").write_text("x")
    for out, message in [
        ("", "no name"), (tmp_path / "new" / "..", "no name"), (tmp_path / "a\nb", r"a\\u\{A\}b\" is no name"),
        (tmp_path / "file" / "moe", "is a file"), (tmp_path / "link", "symbolic link"),
        (tmp_path / "a", r"a\.partial is a symbolic link"), (tmp_path / "b", r"b\.partial is in the way"),
    ]:  # fmt: skip
        with pytest.raises((ValueError, FileExistsError), match=message):
            prepare(llama, out, E, 2)


def test_only_files_of_a_conversion_are_deleted(llama, tmp_path):
    """A folder with another run's manifest and files of its own and of somebody else."""
    partial = tmp_path / "moe.partial"
    (partial / "additional_chat_templates").mkdir(parents=True)
    for name in ("model-00001-of-00009.safetensors", "tokenizer.json.tmp", "additional_chat_templates/a.jinja"):
        (partial / name).write_text("x")
    for manifest in ("[1]", "null", "{}", '{"settings": {}, "shards": []}', "[" * 50_000):
        (partial / "conversion.json").write_text(manifest)
        with pytest.raises(FileExistsError, match="partial is in the way"):
            quick(llama, tmp_path / "moe")
    (partial / "conversion.json").write_text('{"settings": {}, "shards": {}}')
    for foreign in ("notes.txt", "sub/tokenizer.json", "additional_chat_templates/sub/a.jinja"):
        (partial / foreign).parent.mkdir(exist_ok=True)
        (partial / foreign).write_text("precious")
        with pytest.raises(FileExistsError, match="is in the way"):
            quick(llama, tmp_path / "moe")
        (partial / foreign).unlink()
        if (partial / foreign).parent not in (partial, partial / "additional_chat_templates"):
            (partial / foreign).parent.rmdir()
    quick(llama, tmp_path / "moe")
    quick(llama, tmp_path / "straight")
    assert contents(tmp_path / "moe") == contents(tmp_path / "straight")
    assert not (tmp_path / "moe/additional_chat_templates").exists()


def test_two_conversions_do_not_write_one_folder(llama, tmp_path, monkeypatch):
    first, second = (prepare(llama, tmp_path / "moe", E, 2, seed=seed) for seed in (0, 1))
    write, tried = conversion.write_companions, []

    def meanwhile(job):
        with pytest.raises(FileExistsError, match=r"another conversion is writing .*moe"):
            second.run(verify=False, progress=False)
        tried.append(job)
        write(job)

    monkeypatch.setattr(conversion, "write_companions", meanwhile)
    first.run(verify=False, progress=False)
    assert tried == [first]
    with pytest.raises(FileExistsError, match="not empty"):  # it was prepared while there was none
        second.run(verify=False, progress=False)
    assert json.loads((tmp_path / "moe/upcycling_receipt.json").read_text())["conversion"]["seed"] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["moe"]


def test_a_folder_name_cannot_write_the_cards_front_matter(llama, tmp_path):
    source = tmp_path / "a\n---\nlicense: evil"
    shutil.copytree(llama, source)
    quick(source, tmp_path / "moe")
    assert "\nlicense: evil" not in (tmp_path / "moe/README.md").read_text()


def test_sources_that_cannot_be_read_say_why(llama, tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        quick(tmp_path / "nowhere", tmp_path / "moe")
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    shutil.copy(llama / "config.json", pickled)
    (pickled / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match=r"pickle.*save_pretrained"):
        quick(pickled, tmp_path / "moe")
    (pickled / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors"):
        quick(pickled, tmp_path / "moe")
    for name, spoil, message in [
        ("truncated", lambda path: path.write_bytes(path.read_bytes()[:-9]), "truncated or damaged"),
        ("incomplete", lambda path: path.unlink(), "not in the folder"),
    ]:
        copy = tmp_path / name
        shutil.copytree(llama, copy)
        spoil(sorted(copy.glob("*.safetensors"))[-1])
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            quick(copy, tmp_path / "moe")


def test_tensors_that_do_not_fit_the_configuration_are_named(tmp_path):
    source = saved(tmp_path, max_shard_size="1GB")
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    for changed, message in [
        ({k: v for k, v in tensors.items() if k != name}, f"{name} is missing"),
        ({**tensors, "model.layers.1.mlp.extra": torch.zeros(1)}, "extra"),
        ({**tensors, name: torch.zeros(3, 3)}, rf"{name} is \(3, 3\)"),
    ]:
        save_file(changed, source / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=message):
            quick(source, tmp_path / "moe")
    assert not (tmp_path / "moe.partial").exists()


def test_tied_twins_that_differ_are_refused_and_equal_ones_are_not(tmp_path):
    source = saved(tmp_path, "tied", max_shard_size="1GB")
    tensors = load_file(source / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    for twin in (embedding + 1, embedding.double()):
        save_file({**tensors, "lm_head.weight": twin}, source / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"lm_head\.weight is not model\.embed_tokens.*set tie_word_embeddings"):
            quick(source, tmp_path / "moe")
    save_file({**tensors, "lm_head.weight": embedding.clone()}, source / "model.safetensors", {"format": "pt"})
    quick(source, tmp_path / "moe")
    assert "lm_head.weight" not in WeightFiles(tmp_path / "moe").names


def test_integer_weights_are_refused_by_name(tmp_path):
    source = saved(tmp_path, max_shard_size="1GB")
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.norm\.weight has type int8"):
        quick(source, tmp_path / "moe")


def test_results_that_are_not_finite_are_refused_with_noise_too(llama, tmp_path):
    with pytest.raises(ValueError, match="not finite"):
        convert(llama, tmp_path / "moe", E, 2, init="noise", noise=1e39, progress=False)
    assert not (tmp_path / "moe").exists()


@pytest.mark.parametrize("file,text,message", [
    ("config.json", {"num_attention_heads": 0}, "dense"), ("config.json", {"dtype": "float3"}, "dense"),
    ("config.json", {"hidden_size": "32"}, "hidden_size"), ("config.json", {"model_type": ["llama"]}, "model_type"),
    ("config.json", "[" * 50_000, "config.json"), ("config.json", "null", "config.json"),
    ("generation_config.json", "{", "generation_config.json"),
    ("generation_config.json", '{"cache_implementation": "zzz"}', "generation_config.json"),
    ("tokenizer.json", "{", "tokenizer.json"), ("tokenizer.json", "{}", "tokenizer.json"),
    ("model.safetensors.index.json", "[]", "index.json is not a JSON object"),
    ("model.safetensors.index.json", {"metadata": None}, "index.json needs .* metadata"),
    ("model.safetensors.index.json", {"weight_map": {"a": 5}}, "index.json names 5"),
    ("model.safetensors.index.json", {"weight_map": {"a": "../b"}}, r"index.json names '\.\./b'"),
])  # fmt: skip
def test_a_broken_file_is_named_before_anything_is_written(file, text, message, llama, tmp_path):
    source = tmp_path / "dense"
    shutil.copytree(llama, source)
    if isinstance(text, dict):
        text = json.dumps({**json.loads((source / file).read_text()), **text})
    (source / file).write_text(text)
    with pytest.raises((ValueError, OSError), match=message) as caught:
        prepare(source, tmp_path / "moe", E, 2)
    assert str(source) in str(caught.value)


@pytest.mark.parametrize("file,change", [
    ("config.json", {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}}),
    ("tokenizer_config.json", {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}),
])  # fmt: skip
def test_code_of_the_model_is_never_run_nor_asked_about(file, change, llama, tmp_path, monkeypatch):
    source = tmp_path / "dense"
    shutil.copytree(llama, source)
    values = json.loads((source / file).read_text()) if (source / file).exists() else {}
    (source / file).write_text(json.dumps({**values, **change}))
    (source / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(ValueError, match=r"auto_map.*not run here"):
        convert(source, tmp_path / "moe", E, 2, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_too_many_experts_are_refused_at_once(llama, tmp_path):
    with pytest.raises(ValueError, match="more than 4096"):
        prepare(llama, tmp_path / "moe", 10**9, 2)


def test_a_family_without_a_stock_class_is_refused_with_the_reason(tmp_path):
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=61)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValueError, match=r"no stock MoE class.*nearest"):
        quick(tmp_path / "gpt2", tmp_path / "moe")


# ------------------------------------------------------------------------------------------------------------- the hub


def test_a_hub_name_is_fetched_without_pickles_and_named_in_the_card(llama, tmp_path, monkeypatch):
    asked = {}

    def fetch(name, allow_patterns):
        asked[name] = allow_patterns
        return str(llama)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    quick("someone/model-1b", tmp_path / "moe")
    assert list(asked) == ["someone/model-1b"] and "*.safetensors" in asked["someone/model-1b"]
    assert not any("bin" in pattern or pattern.endswith((".py", ".pt")) for pattern in asked["someone/model-1b"])
    front = yaml.safe_load((tmp_path / "moe/README.md").read_text().split("---\n")[1])
    assert front["base_model"] == "someone/model-1b"


def test_offline_the_message_says_what_to_do(monkeypatch):
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(*_, **__):
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(FileNotFoundError, match=r"cannot be reached.*give its folder"):
        open_source("someone/model-1b")
    for not_a_name in ("./model", "a/b/c", "/nowhere/model"):
        with pytest.raises(FileNotFoundError, match="there is no folder"):
            open_source(not_a_name)


# --------------------------------------------------------------------------------------------------------- real models


def test_the_real_tiny_model_reads_the_same(tmp_path):
    receipt = convert(TINY_LLAMA, tmp_path / "moe", 8, 2, progress=False)
    assert receipt.passed and receipt.greedy_equal and "real text" in receipt.checks
    dense, moe = (transformers.AutoModelForCausalLM.from_pretrained(path) for path in (TINY_LLAMA, tmp_path / "moe"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "moe")
    ids_BT = tokenizer("Once upon a time, there was a", return_tensors="pt")["input_ids"]
    assert (logits(dense, ids_BT) - logits(moe, ids_BT)).abs().max() <= receipt.tolerance
    texts = [tokenizer.decode(m.generate(ids_BT, max_new_tokens=40, do_sample=False)[0]) for m in (dense, moe)]
    assert texts[0] == texts[1] and texts[0].startswith("Once upon a time, there was a little")


def write_random_llama(folder, layers=22, hidden=2048, ffn=5632, kv=256, vocab=32000):
    """TinyLlama's shape in bfloat16, one weight file a layer, without ever holding the model."""
    config = transformers.LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=4, max_position_embeddings=2048, dtype="bfloat16", architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    generator, where = torch.Generator().manual_seed(0), {}

    def write(file, shapes):
        tensors = {name: 0.02 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        tensors = {name: (t if t.ndim > 1 else 1 + t).bfloat16() for name, t in tensors.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        where.update(dict.fromkeys(shapes, file))

    write("ends.safetensors", {
        "model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden),
    })  # fmt: skip
    shapes = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn), "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
    }  # fmt: skip
    for i in range(layers):
        write(f"{i}.safetensors", {f"model.layers.{i}.{name}.weight": shape for name, shape in shapes.items()})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


AND_PEAK = """import runpy
try:
    runpy.run_module("upcycling", run_name="__main__", alter_sys=True)
finally:
    (peak,) = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM:")]
    print(peak)
"""
"""The command line, then its own peak of memory in KiB: `ru_maxrss` has the peak of the starting process in it."""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak memory as Linux has it")
def test_a_1b_llama_becomes_8_experts_within_4_gib(tmp_path):
    """1.1B parameters to 6.4B: 12.9 GB written and verified, by the command line, in the memory of one layer."""
    if shutil.disk_usage(tmp_path).free < 17e9:
        pytest.skip("needs 17 GB of disk")
    write_random_llama(tmp_path / "dense")
    command = [sys.executable, "-c", AND_PEAK, str(tmp_path / "dense"), str(tmp_path / "moe")]
    try:
        run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        gib = int(run.stdout.splitlines()[-1]) / 2**20
        print(f"peak {gib:.2f} GiB resident")
        assert gib < 4
        written = WeightFiles(tmp_path / "moe")
        assert sum(torch.Size(shape).numel() for shape in written.shapes.values()) > 6.4e9
        assert json.loads((tmp_path / "moe/upcycling_receipt.json").read_text())["passed"]
    finally:
        shutil.rmtree(tmp_path / "moe", ignore_errors=True)
        shutil.rmtree(tmp_path / "dense")


def test_one_tensor_at_a_time(llama, tmp_path, monkeypatch):
    """While writing, no tensor of the source outlives the one that is made from it."""
    import weakref

    alive, most = [], 0
    read = weight_files.WeightFiles.__getitem__

    def watched(self, name):
        nonlocal alive, most
        tensor = read(self, name)
        alive = [ref for ref in alive if ref() is not None] + [weakref.ref(tensor)]
        most = max(most, len(alive))
        return tensor

    monkeypatch.setattr(weight_files.WeightFiles, "__getitem__", watched)
    quick(llama, tmp_path / "moe")
    assert most <= 2  # the one being written and the next
