"""Loading corpora: the embedded one, local files of every kind, the hub's (with a stand-in), and what can be wrong."""

import csv
import json
import math
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import datasets
import pytest
from hypothesis import given, settings, strategies as st

from upcycling.text import corpus
from upcycling.text.corpus import EntropyFloor, entropy_floor, load_corpus, mend_quotes
from upcycling.text.worlds.world import DOMAINS, WorldConfig, generate

ROOT = Path(__file__).resolve().parents[3]
SHARED = ROOT.parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the real stories of ../shared/data")
TEXTS = [f"Story {number}.\nIt has two lines." for number in range(40)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")


def write(path, texts=TEXTS, extra=None):
    """Write texts as a file of the kind that its name ends in."""
    rows = [{"text": text} | (extra or {}) for text in texts]
    if path.suffix == ".txt":
        path.write_text("\n\n".join(texts), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    else:
        with path.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    return path


def all_texts(splits):
    return [text for split in splits.values() for text in split["text"]]


# Worlds.


def test_worlds_has_its_columns_and_disjoint_splits():
    splits = load_corpus(documents=300)
    assert set(splits) == {"train", "validation"}
    assert splits["train"].column_names == ["text", "domain", "surprisal", "audience", "format", "seed_data"]
    assert splits["train"].features["surprisal"].dtype == "float64"
    assert len(splits["train"]) == 285 and len(splits["validation"]) == 15
    assert sorted(all_texts(splits)) == sorted(row["text"] for row in generate(300))
    assert set(splits["train"]["domain"]) == set(DOMAINS)


def test_the_seed_chooses_documents_and_the_world_chooses_facts():
    first = load_corpus(documents=60)
    assert load_corpus(documents=60)["validation"]["text"] == first["validation"]["text"]
    other_documents = load_corpus(documents=60, seed=1)
    assert not set(all_texts(other_documents)) & set(all_texts(first))
    only_code = load_corpus(documents=60, world=WorldConfig(shares=(0, 0, 1, 0, 0)))
    assert set(only_code["train"]["domain"]) == {"code"}


def test_worlds_is_cached_on_disk_by_its_recipe(tmp_path, monkeypatch):
    first = load_corpus(documents=60, cache_dir=tmp_path)
    assert len(list(tmp_path.glob("worlds-*"))) == 1
    monkeypatch.setattr(corpus.worlds, "generate", None)  # the second time, nothing is generated
    again = load_corpus(documents=60, cache_dir=tmp_path)
    assert again["train"].to_dict() == first["train"].to_dict()
    assert again["train"].cache_files  # mapped into memory from disk
    monkeypatch.undo()
    load_corpus(documents=61, cache_dir=tmp_path)
    load_corpus(documents=60, cache_dir=tmp_path, world=WorldConfig(n_towns=100))
    assert len(list(tmp_path.iterdir())) == 3  # and no temporary folder is left


def test_the_cache_is_of_every_module_and_data_file_of_the_generator(tmp_path, monkeypatch):
    package = Path(corpus.worlds.__file__).parent
    copied = Path(shutil.copytree(package, tmp_path / "worlds", ignore=shutil.ignore_patterns("__pycache__")))
    before = corpus._worlds_sources()
    monkeypatch.setattr(corpus, "files", lambda _: copied)
    assert corpus._worlds_sources() == before
    sources = [path for path in copied.rglob("*") if path.is_file()]
    assert {path.name for path in sources} > {"grammar.py", "world.py", "words.txt", "stories.txt", "code.json"}
    for path in sources:
        text = path.read_bytes()
        path.write_bytes(text + b"\n")
        assert corpus._worlds_sources() != before, path
        path.write_bytes(text)


def test_an_interrupted_cache_is_not_used(tmp_path, monkeypatch):
    def fail(self, folder):
        Path(folder, "half-written").write_text("")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(datasets.DatasetDict, "save_to_disk", fail)
        with pytest.raises(OSError, match="No space left"):
            load_corpus(documents=60, cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert len(all_texts(load_corpus(documents=60, cache_dir=tmp_path))) == 60


# Local files.


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".parquet", ".csv"])
def test_every_kind_of_file_gives_the_same_documents(tmp_path, suffix):
    splits = load_corpus(write(tmp_path / f"my stories{suffix}"), validation_fraction=0.2, cache_dir=tmp_path / "cache")
    assert sorted(all_texts(splits)) == sorted(TEXTS)
    assert len(splits["validation"]) == 8
    assert splits["train"].cache_files  # on disk, mapped into memory
    # The split depends on the texts and the seed, not on the kind of file.
    reference = load_corpus(write(tmp_path / "reference.jsonl"), validation_fraction=0.2, cache_dir=tmp_path / "cache")
    assert splits["validation"]["text"] == reference["validation"]["text"]


def test_a_text_file_is_split_at_end_of_text_marks_if_it_has_any(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("One.\n\nStill one.<|endoftext|>\nTwo.\n<|endoftext|>Three.<|endoftext|>\n", encoding="utf-8-sig")
    assert sorted(all_texts(load_corpus(path))) == ["One.\n\nStill one.", "Three.", "Two."]


def test_an_edited_file_is_read_again(tmp_path):
    for suffix in (".txt", ".jsonl"):
        path = write(tmp_path / f"a{suffix}")
        before = os.stat(path)
        assert sorted(all_texts(load_corpus(path))) == sorted(TEXTS)
        write(path, [text.replace("Story", "Novel") for text in TEXTS])
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1_000_000_000))
        assert all(text.startswith("Novel") for text in all_texts(load_corpus(path)))


def test_other_columns_are_kept(tmp_path):
    path = tmp_path / "worlds.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in generate(50)), encoding="utf-8")
    splits = load_corpus(path)
    assert "surprisal" in splits["train"].column_names and set(splits["train"]["domain"]) <= set(DOMAINS)


def test_a_folder_with_validation_files_uses_them(tmp_path):
    write(tmp_path / "b_train.jsonl", TEXTS[:20])
    write(tmp_path / "a_train.jsonl", TEXTS[20:30])
    write(tmp_path / "my_valid.jsonl", TEXTS[29:])  # one document is in both
    (tmp_path / "README.md").write_text("ignored")
    splits = load_corpus(tmp_path)
    assert splits["train"]["text"] == TEXTS[20:29] + TEXTS[:20]
    assert splits["validation"]["text"] == TEXTS[29:]


def test_a_folder_without_validation_files_is_split(tmp_path):
    write(tmp_path / "one.txt", TEXTS[:20])
    write(tmp_path / "two.txt", TEXTS[20:])
    splits = load_corpus(tmp_path, validation_fraction=0.1)
    assert sorted(all_texts(splits)) == sorted(TEXTS)
    assert len(splits["validation"]) == 4


def test_copies_of_a_text_are_in_one_split_and_blank_ones_in_none(tmp_path):
    splits = load_corpus(write(tmp_path / "a.jsonl", [*TEXTS, "", "  \n", *TEXTS]), validation_fraction=0.3)
    assert not set(splits["train"]["text"]) & set(splits["validation"]["text"])
    assert sorted(all_texts(splits)) == sorted(TEXTS * 2)
    assert len(splits["validation"]) == 24


def test_another_seed_chooses_other_validation_documents(tmp_path):
    path = write(tmp_path / "a.jsonl")
    chosen = [load_corpus(path, seed=seed, validation_fraction=0.25)["validation"]["text"] for seed in (0, 1, 0)]
    assert chosen[0] == chosen[2] != chosen[1]


def test_documents_limits_how_many_are_taken(tmp_path):
    splits = load_corpus(write(tmp_path / "a.jsonl"), documents=10)
    assert sorted(all_texts(splits)) == sorted(TEXTS[:10])


def test_quotes_are_mended_in_local_files(tmp_path):
    texts = [f"{number}: â€œHelloâ€\x9d, she said. Itâ€™s café." for number in range(10)]
    assert all(
        "“Hello”, she said. It’s café." in text for text in all_texts(load_corpus(write(tmp_path / "a.json", texts)))
    )


@needs_shared
def test_the_real_stories(tmp_path):
    one_file = load_corpus(SHARED / "tinystories_train.jsonl", cache_dir=tmp_path)
    assert len(all_texts(one_file)) == 5_630
    (tmp_path / "both").mkdir()
    for name in ("tinystories_train.jsonl", "tinystories_valid.jsonl"):
        (tmp_path / "both" / name).write_bytes((SHARED / name).read_bytes())
    both = load_corpus(tmp_path / "both", cache_dir=tmp_path)
    assert (len(both["train"]), len(both["validation"])) == (5_630, 599)
    assert "surprisal" not in both["train"].column_names


# What can be wrong with a file.


def test_what_is_wrong_with_a_file_is_said_in_one_sentence(tmp_path):
    def message(name, content=None):
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            load_corpus(path)
        text = str(error.value)
        assert name in text and "\n" not in text
        return text

    assert "there is no file or folder" in message("missing.jsonl")
    assert "give an existing path, or one of worlds, tinystories, cosmopedia-100k" in message("missing")
    assert "is empty" in message("empty.txt", b"")
    assert "found no documents" in message("blank.txt", b"\n \n\n")
    assert "found no documents" in message("blank.jsonl", b"\n\n")
    assert "has 1 different documents; at least 2" in message("single.txt", b"One.\n")
    assert "has 1 different documents" in message("copies.jsonl", b'{"text": "a"}\n{"text": "a"}\n')
    assert "is not UTF-8 (byte 0xe9 near position 3); save it as UTF-8" in message("latin.txt", b"caf\xe9 au lait\n\nb")
    assert "is not UTF-8 (byte 0xff" in message("binary.jsonl", b'{"text": "\xff"}\n')
    assert "is not UTF-8 (byte 0xc3 near position 8)" in message("cut.csv", b"text\ncaf\xc3")
    late = b"text\n" + 3_000_000 * b"a" + "é".encode() + b"\xe9,\r\n"
    assert "is not UTF-8 (byte 0xe9 near position 3000007)" in message("late.csv", late)
    assert "found no documents in" in message("broken.jsonl", b'{"text": "a"}\n{"text": \n')
    assert "mixed.jsonl" in message("mixed.jsonl", b'{"text": "a"}\n{"text": [1]}\n')
    assert "found no documents in" in message("broken.parquet", b"PAR1 no it is not")
    assert "not strings; every row needs one text" in message("lists.jsonl", b'{"text": ["a"]}\n{"text": ["b"]}\n')
    assert "holds int64, not strings" in message("numbers.jsonl", b'{"text": 1}\n{"text": 2}\n')
    assert "has no text (null)" in message("null.jsonl", b'{"text": "a"}\n{"text": null}\n{"text": "b"}\n')
    assert "has no column 'text', only story, title; rename" in message("other.csv", b"story,title\na,b\n")
    assert "is not a .txt, .jsonl" in message("novel.pdf", b"%PDF")


def test_what_is_wrong_with_a_folder_is_said_in_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no \.txt, .* file; put the corpus there"):
        load_corpus(tmp_path)
    write(tmp_path / "valid.jsonl", TEXTS[:5])
    with pytest.raises(FileNotFoundError, match="has only validation files"):
        load_corpus(tmp_path)
    write(tmp_path / "train.jsonl", TEXTS[:5])
    with pytest.raises(ValueError, match="no documents for train that are not in the other split"):
        load_corpus(tmp_path)
    write(tmp_path / "train.txt")
    with pytest.raises(ValueError, match="files of different kinds; keep one kind"):
        load_corpus(tmp_path)


def test_impossible_arguments_are_refused():
    with pytest.raises(ValueError, match="validation_fraction=1; choose a number between 0 and 1"):
        load_corpus(validation_fraction=1)
    with pytest.raises(ValueError, match="documents=1; at least 2"):
        load_corpus(documents=1)
    with pytest.raises(ValueError, match="world is for the corpus 'worlds', not for 'tinystories'"):
        load_corpus("tinystories", world=WorldConfig())


# The hub.


def test_the_hubs_corpora_come_with_their_columns(monkeypatch):
    asked = []

    def load_dataset(repository, cache_dir):
        asked.append(repository)
        if repository == "roneneldan/TinyStories":
            mangled = [f"â€œ{text}â€\x9d" for text in TEXTS]
            split = {"train": mangled[:30], "validation": mangled[30:]}
            return datasets.DatasetDict(
                {key: datasets.Dataset.from_dict({"text": texts}) for key, texts in split.items()}
            )
        columns = {"prompt": TEXTS, "text_token_length": [9] * 40, "text": TEXTS, "seed_data": ["stanford"] * 40}
        columns |= {"format": ["blogpost"] * 40, "audience": ["general"] * 40}
        return datasets.DatasetDict({"train": datasets.Dataset.from_dict(columns)})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(corpus, "_is_cached", lambda *_: True)
    tiny = load_corpus("tinystories")
    assert tiny["validation"]["text"] == [f"“{text}”" for text in TEXTS[30:]]
    assert len(tiny["train"]) == 30
    cosmopedia = load_corpus("cosmopedia-100k", validation_fraction=0.1)
    assert {"text", "prompt", "audience", "format", "seed_data"} < set(cosmopedia["train"].column_names)
    assert (len(cosmopedia["train"]), len(cosmopedia["validation"])) == (36, 4)
    assert asked == ["roneneldan/TinyStories", "HuggingFaceTB/cosmopedia-100k"]


@pytest.mark.parametrize(
    ("name", "offline"),
    [("tinystories", {"HF_HUB_OFFLINE": "1"}), ("cosmopedia-100k", {"HF_ENDPOINT": "http://127.0.0.1:9"})],
    ids=["told to be offline", "no connection"],
)
def test_offline_the_hubs_corpora_fail_at_once_and_name_the_default(name, offline, tmp_path):
    code = f"""
from upcycling import load_corpus
try:
    load_corpus({name!r})
except ConnectionError as error:
    print(error)
"""
    environment = os.environ | offline | {"HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT / "lib")}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    (message,) = result.stdout.splitlines()
    assert message.startswith(f"could not load {corpus.HUB[name]} from the Hugging Face hub (")
    assert "give load_corpus the path of a local copy" in message and "load_corpus('worlds')" in message
    assert "Retrying" not in result.stderr  # which takes half a minute


# Mending.

typographic = "“”‘’„–—…•"
ordinary = "abc XYZ.,!?\"'\n áàâãäåæçéèêëíìîïñóòôõöøúùûüýÿßœŒšžŸ€£¥©®°µ½¿¡中文日本ελληνικά"


def misread(text, encoding):
    """What programs make of UTF-8 read as another encoding: undefined bytes stay as control characters."""
    return "".join(
        corpus._misread(character, encoding) if character in typographic else character for character in text
    )


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=ordinary + typographic), st.sampled_from(["cp1252", "latin-1"]))
def test_mending_restores_what_was_misread_and_leaves_the_rest_alone(text, encoding):
    if "â€" not in text:  # which no correct text contains
        assert mend_quotes(text) == text
        assert mend_quotes(misread(text, encoding)) == text


def test_mending_knows_the_sequences_of_the_real_corpus():
    assert (
        mend_quotes("â€œIâ€™m here,â€\x9d he said â€” orâ€¦ â€˜noâ€™ â€“ yes.")
        == "“I’m here,” he said — or… ‘no’ – yes."
    )
    assert mend_quotes("â€œClosing byte lost,â€ she said.") == "“Closing byte lost,” she said."
    assert "“é”".encode().decode("latin-1") == "â\x80\x9cÃ©â\x80\x9d"
    assert mend_quotes("â\x80\x9cHiâ\x80\x9d") == "“Hi”"
    assert mend_quotes("château, pâté, â la carte, 5 € – “fine”") == "château, pâté, â la carte, 5 € – “fine”"


# The entropy floor.


def test_the_floor_is_total_surprisal_over_total_tokens():
    columns = {"text": ["a", "b", "c"], "domain": ["code", "code", "stories"], "surprisal": [10.0, 20.0, 6.0]}
    rows = datasets.Dataset.from_dict(columns)
    assert entropy_floor(rows, [5, 10, 3]) == EntropyFloor(36 / 18, {"stories": 2.0, "code": 2.0})
    assert entropy_floor(rows, [5, 5, 2]).by_domain == {"stories": 3.0, "code": 3.0}


def test_the_floor_needs_surprisals_and_a_count_for_each_document():
    with pytest.raises(ValueError, match="no column 'surprisal', so its entropy floor is unknown"):
        entropy_floor(datasets.Dataset.from_dict({"text": ["a"]}), [3])
    with pytest.raises(ValueError, match="2 token counts for 1 documents"):
        entropy_floor(datasets.Dataset.from_dict({"text": ["a"], "domain": ["code"], "surprisal": [1.0]}), [3, 4])


def test_a_trained_model_does_not_get_below_the_floor():
    """A model of characters in a very small world: all it learns does not bring it below the floor."""
    tiny = WorldConfig(n_towns=24, n_words=100, n_characters=8, n_functions=8, shares=(0, 0, 0, 0, 1))
    splits = load_corpus(documents=200, world=tiny, validation_fraction=0.05)
    order, seen = 9, {}
    for text in splits["train"]["text"]:
        text = "\0" * order + text + "\0"
        for place in range(order, len(text)):
            for length in range(order + 1):
                following = seen.setdefault(text[place - length : place], Counter())
                following[text[place]] += 1

    def nats(context, character):
        chance = 1 / 128
        for length in range(order + 1):  # each longer context corrects the shorter one's guess (Witten and Bell 1991)
            if following := seen.get(context[order - length :]):
                total, kinds = following.total(), len(following)
                chance = (following[character] + kinds * chance) / (total + kinds)
        return -math.log(chance)

    reached = 0.0
    for text in splits["validation"]["text"]:
        text = "\0" * order + text + "\0"
        reached += sum(nats(text[place - order : place], text[place]) for place in range(order, len(text)))
    n_characters = [len(text) + 1 for text in splits["validation"]["text"]]
    floor = entropy_floor(splits["validation"], n_characters).overall
    assert floor < reached / sum(n_characters) < 5 * floor
