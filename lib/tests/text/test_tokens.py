"""Tokenizers reverse on any text, streams hold exactly the documents, no kill or damage goes unnoticed."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from upcycling.checks import IGNORE
from upcycling.text import stream as tokens, stream_files, tokenizer as tokenizer_module
from upcycling.text.stream import TokenStream, padded_batch
from upcycling.text.tokenizer import (
    SPECIAL_TOKENS,
    bos_eos,
    bytes_per_token,
    encode_documents,
    encode_prompt,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
)

DATA = Path(__file__).parents[3].parent / "shared" / "data"
NASTY = [
    "",
    " ",
    "<|im_end|>",
    "a<|im_start|>b<|unknown|>",
    "naïve 👩‍👩‍👧 日本語 \u202e\ufeff\ufffd",
    "\x00\x1b\r\n\t  x ",
    "\U0010ffff\ue000",
]


def encode_document(tokenizer, text):
    (ids,) = encode_documents(tokenizer, [text])
    return ids


def make_texts(count, seed=0):
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 9))) for _ in range(300)]
    return [" ".join(rng.choices(words, k=rng.randint(5, 60))) + "." for _ in range(count)]


def as_dataset(texts):
    from datasets import Dataset

    return Dataset.from_dict({"text": texts, "number": list(range(len(texts)))})


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(make_texts(200), vocab_size=400)


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(tokenizer_module, "_BATCH_DOCUMENTS", 16)


# ------------------------------------------------------------------------------------------------------ tokenizers


def test_vocabulary_has_the_asked_size_and_the_special_tokens_first(tokenizer):
    assert tokenizer.get_vocab_size() == 400
    assert [tokenizer.id_to_token(i) for i in range(3)] == list(SPECIAL_TOKENS)
    assert bos_eos(tokenizer) == (1, 2)


def test_training_is_deterministic_and_does_not_depend_on_batches(tokenizer, small_batches):
    assert train_tokenizer(iter(make_texts(200)), vocab_size=400).to_str() == tokenizer.to_str()


def test_batches_end_after_so_many_documents_or_characters(small_batches):
    assert [len(batch) for batch in tokenizer_module.in_batches(iter(make_texts(100)))] == [16] * 6 + [4]
    assert [len(batch) for batch in tokenizer_module.in_batches(["x" * 600_000] * 5)] == [2, 2, 1]


some_text = st.one_of(
    st.text(),
    st.lists(st.one_of(st.sampled_from(NASTY), st.text(max_size=5), st.sampled_from("😀é\u0301\u200d\x7f\x85"))).map(
        "".join
    ),
)


@given(text=some_text)
@settings(max_examples=300, deadline=None)
def test_any_text_comes_back_and_yields_no_special_token(tokenizer, text):
    ids = encode_document(tokenizer, text)
    assert (ids[0], ids[-1]) == (1, 2)
    assert not set(ids[1:-1]) & {0, 1, 2}, "a string in the text became a special token"
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids[1:-1], skip_special_tokens=False) == text


def test_special_strings_stay_text_in_a_tokenizer_that_would_parse_them(tokenizer):
    from tokenizers import Tokenizer

    raw = Tokenizer.from_str(tokenizer.to_str())
    assert raw.encode("<|im_end|>").ids == [2]
    raw.enable_truncation(3)
    raw.enable_padding(length=50)
    assert encode_document(raw, "a <|im_end|> b") == encode_document(tokenizer, "a <|im_end|> b")


def test_a_prompt_starts_like_a_document_and_does_not_end(tokenizer):
    assert encode_prompt(tokenizer, "abc") == encode_document(tokenizer, "abc")[:-1]


@pytest.mark.parametrize("vocab_size", [0, 256, 259])
def test_vocab_size_without_room_for_merges(vocab_size):
    with pytest.raises(ValueError, match=f"vocab_size={vocab_size} is too small.* need 260"):
        train_tokenizer(make_texts(5), vocab_size=vocab_size)


def test_vocab_size_that_the_texts_do_not_yield():
    with pytest.raises(ValueError, match=r"vocab_size=2048 cannot be reached: these texts yield only \d+ tokens"):
        train_tokenizer(["tiny text"])


@pytest.mark.parametrize(("texts", "message"), [("one str", "is one str"), ([{"text": "a"}], "document 0 is dict")])
def test_training_on_what_is_not_texts(texts, message):
    with pytest.raises(TypeError, match=message):
        train_tokenizer(texts, vocab_size=300)


def test_saved_tokenizer_loads_here_and_in_transformers_with_the_same_ids(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from transformers import AutoTokenizer

    save_tokenizer(tokenizer, tmp_path / "tok")
    assert sorted(os.listdir(tmp_path / "tok")) == ["tokenizer.json", "tokenizer_config.json"]
    auto = AutoTokenizer.from_pretrained(tmp_path / "tok")
    assert (auto.unk_token_id, auto.bos_token_id, auto.eos_token_id, len(auto)) == (0, 1, 2, 400)
    for text in make_texts(20, seed=1) + NASTY:
        ids = encode_document(tokenizer, text)
        assert encode_document(load_tokenizer(tmp_path / "tok"), text) == ids
        assert encode_document(load_tokenizer(tmp_path / "tok" / "tokenizer.json"), text) == ids
        assert auto(text)["input_ids"] == ids[1:-1]
        assert auto.decode(ids, skip_special_tokens=True) == text


def test_load_what_is_not_there_or_not_a_tokenizer(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no tokenizer at"):
        load_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match="no tokenizer at"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer"):
        load_tokenizer(tmp_path)


def test_gpt2_by_name_offline_says_what_to_do(monkeypatch):
    import huggingface_hub

    asked = []

    def offline(repository, filename, **options):
        asked.append((repository, filename, options))
        raise huggingface_hub.errors.LocalEntryNotFoundError("cannot reach the hub")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(FileNotFoundError, match=r"'gpt2'.*connect once.*or pass a folder"):
        load_tokenizer("gpt2")
    assert [options for _, _, options in asked] == [{"local_files_only": True}, {}], "the local cache comes first"
    assert asked[0][:2] == ("openai-community/gpt2", "tokenizer.json")


def test_a_tokenizer_without_document_marks_is_refused():
    from tokenizers import Tokenizer, models

    with pytest.raises(ValueError, match=r"known pairs: .*<.endoftext.>"):
        bos_eos(Tokenizer(models.BPE()))


def test_bytes_per_token_counts_utf8_and_no_marks(tokenizer):
    assert bytes_per_token(tokenizer, ["é", "日"]) == pytest.approx(5 / 5)
    text = make_texts(1)[0]
    assert bytes_per_token(tokenizer, [text] * 3) == pytest.approx(
        len(text) / (len(encode_document(tokenizer, text)) - 2)
    )
    with pytest.raises(ValueError, match="at least one text"):
        bytes_per_token(tokenizer, [""])


# ---------------------------------------------------------------------------------------------- a stream on disk


def test_stream_is_the_documents_one_after_the_other(tokenizer, tmp_path, small_batches):
    texts = make_texts(50) + NASTY
    stream = TokenStream.build(as_dataset(texts), tokenizer, tmp_path, progress=False)
    documents = encode_documents(tokenizer, texts)
    assert stream.tokens.tolist() == [i for ids in documents for i in ids]
    assert stream.document_lengths.tolist() == [len(ids) for ids in documents]
    assert len(stream) == stream.document_lengths.sum()
    assert isinstance(stream.tokens, np.memmap) and stream.tokens.dtype == np.uint16
    assert stream.vocab_size == 400
    pieces = np.split(stream.tokens, np.cumsum(stream.document_lengths)[:-1])
    assert [tokenizer.decode(piece.tolist()) for piece in pieces] == texts


def test_stream_is_opened_not_built_when_it_exists_and_keyed_by_content(tokenizer, tmp_path, monkeypatch):
    texts = make_texts(30)
    first = TokenStream.build(as_dataset(texts), tokenizer, tmp_path, progress=False)
    changed = TokenStream.build(as_dataset(texts[:-1] + ["other"]), tokenizer, tmp_path, progress=False)
    other_tokenizer = train_tokenizer(make_texts(200), vocab_size=401)
    retokenized = TokenStream.build(as_dataset(texts), other_tokenizer, tmp_path, progress=False)
    shifted = TokenStream.build(
        as_dataset([texts[0] + texts[1][:1], texts[1][1:], *texts[2:]]), tokenizer, tmp_path, progress=False
    )
    assert len({first.key, changed.key, retokenized.key, shifted.key}) == 4

    monkeypatch.setattr(stream_files, "encode_plain", lambda *_: pytest.fail("tokenized again"))
    renamed = as_dataset(texts).rename_column("text", "story")
    again = TokenStream.build(renamed, tokenizer, tmp_path, column="story", progress=False)
    assert again.key == first.key and np.array_equal(again.tokens, first.tokens)


def test_large_vocabulary_takes_four_bytes(tmp_path, tokenizer, monkeypatch):
    assert [stream_files.id_dtype(size) for size in (2**16, 2**16 + 1)] == ["<u2", "<u4"]
    monkeypatch.setattr(stream_files, "id_dtype", lambda _: "<u4")
    stream = TokenStream.build(as_dataset(["abc"] * 3), tokenizer, tmp_path, progress=False)
    assert stream.tokens.dtype == np.uint32 and stream.tokens.tolist() == encode_document(tokenizer, "abc") * 3


def test_memory_does_not_grow_with_the_corpus(tokenizer, tmp_path, small_batches):
    def peak(rows):
        dataset = as_dataset(make_texts(100) * (rows // 100))  # Arrow memory is outside of what is traced
        tracemalloc.start()
        TokenStream.build(dataset, tokenizer, tmp_path / str(rows), progress=False)
        result = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return result

    peak(400)  # imports and caches
    small, large = peak(800), peak(3200)
    assert large < 1.3 * small, f"{small} bytes for 800 rows, {large} for 3200"


CHILD = """
import json, os, signal, sys
from pathlib import Path
from datasets import Dataset
from upcycling.text import stream as tokens, stream_files, tokenizer as tokenizer_module

folder, moment = Path(sys.argv[1]), sys.argv[2]
tokenizer_module._BATCH_DOCUMENTS = 16
write_record, batches = stream_files._write_record, 0

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def killed_between_data_and_record(files, record):
    if record["done"] == 64:
        die()
    write_record(files, record)

def killed_between_two_files(descriptor, fsync=os.fsync):
    fsync(descriptor)
    if Path(f"/proc/self/fd/{descriptor}").resolve().suffix == ".bin" and done_before() == 48:
        with open(Path(f"/proc/self/fd/{descriptor}").resolve(), "ab") as file:
            file.write(b"x")  # half a token of the next batch
        die()

def done_before():
    return json.loads(next(folder.glob("tokens-*.json")).read_text())["done"]

if moment == "record":
    stream_files._write_record = killed_between_data_and_record
else:
    os.fsync = killed_between_two_files
texts = json.loads((folder / "texts.json").read_text())
rows = Dataset.from_dict({"text": texts})
tokens.TokenStream.build(rows, tokenizer_module.load_tokenizer(folder), folder, progress=False)
"""


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="the child finds out what it writes through /proc")
@pytest.mark.parametrize("moment", ["record", "data"])
def test_build_killed_with_sigkill_goes_on_to_the_same_bytes(tokenizer, tmp_path, small_batches, monkeypatch, moment):
    texts = make_texts(200)
    whole = TokenStream.build(as_dataset(texts), tokenizer, tmp_path / "whole", progress=False)
    save_tokenizer(tokenizer, tmp_path)
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    environment = {**os.environ, "PYTHONPATH": str(Path(tokens.__file__).parents[2]), "HF_HOME": str(tmp_path / "hf")}
    child = subprocess.run(
        [sys.executable, "-c", CHILD, tmp_path, moment], env=environment, capture_output=True, text=True
    )
    assert child.returncode == -signal.SIGKILL, child.stderr
    record = json.loads((tmp_path / f"tokens-{whole.key}.json").read_text())
    torn = (tmp_path / f"tokens-{whole.key}.bin").stat().st_size
    assert record["done"] == 48 and torn > 2 * record["tokens"], "the kill must leave bytes that are not recorded"

    encoded = []
    encode = tokenizer_module.encode_plain
    monkeypatch.setattr(stream_files, "encode_plain", lambda t, batch: encoded.extend(batch) or encode(t, batch))
    resumed = TokenStream.build(as_dataset(texts), tokenizer, tmp_path, progress=False)
    assert encoded == texts[48:], "a resumed build must tokenize what is missing, no more and no less"
    for name in (f"tokens-{whole.key}.bin", f"tokens-{whole.key}.lengths.npy", f"tokens-{whole.key}.json"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert np.array_equal(resumed.tokens, whole.tokens)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-2])


def extend(path):
    path.write_bytes(path.read_bytes() + b"\0\0")


def claim_more(path):
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "tokens": record["tokens"] + 1}))


def garble(path):
    path.write_text('{"documents": 40')


@pytest.mark.parametrize(
    ("suffix", "damage"),
    [
        (".bin", truncate),
        (".bin", extend),
        (".bin", Path.unlink),
        (".lengths.npy", truncate),
        (".lengths.npy", Path.unlink),
        (".json", claim_more),
        (".json", garble),
    ],
)
def test_damaged_stream_is_built_again(tokenizer, tmp_path, suffix, damage):
    dataset = as_dataset(make_texts(40))
    stream = TokenStream.build(dataset, tokenizer, tmp_path, progress=False)
    tokens_before, lengths_before = stream.tokens.tolist(), stream.document_lengths.tolist()
    damage(tmp_path / f"tokens-{stream.key}{suffix}")
    with pytest.warns(UserWarning, match="does not fit its record .* building it again"):
        again = TokenStream.build(dataset, tokenizer, tmp_path, progress=False)
    assert again.tokens.tolist() == tokens_before
    assert again.document_lengths.tolist() == lengths_before


def test_full_disk_keeps_what_is_done(tokenizer, tmp_path, small_batches):
    resource = pytest.importorskip("resource")
    dataset = as_dataset(make_texts(400) * 8)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_001, hard))  # the kernel refuses to write on, as on a full disk
    try:
        with pytest.raises(OSError, match=r"cannot write the token stream \(.*\); what is done is kept: make room"):
            TokenStream.build(dataset, tokenizer, tmp_path, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    record = json.loads(next(tmp_path.glob("tokens-*.json")).read_text())
    assert 0 < record["done"] < len(dataset)
    resumed = TokenStream.build(dataset, tokenizer, tmp_path, progress=False)
    whole = TokenStream.build(dataset, tokenizer, tmp_path / "whole", progress=False)
    assert np.array_equal(resumed.tokens, whole.tokens)


def test_two_builders_of_one_stream_wait_for_each_other(tokenizer, tmp_path, small_batches, monkeypatch):
    dataset, encode, encoded, streams = as_dataset(make_texts(200)), tokenizer_module.encode_plain, [], []
    both_in = threading.Barrier(2)
    content_key = stream_files._content_key

    def key_then_meet(*arguments):
        key = content_key(*arguments)
        both_in.wait(timeout=60)
        return key

    monkeypatch.setattr(stream_files, "_content_key", key_then_meet)
    monkeypatch.setattr(stream_files, "encode_plain", lambda t, batch: encoded.extend(batch) or encode(t, batch))

    def build():
        streams.append(TokenStream.build(dataset, tokenizer, tmp_path, progress=False))

    threads = [threading.Thread(target=build) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(encoded) == 200, "the second builder must find the stream of the first"
    assert np.array_equal(streams[0].tokens, streams[1].tokens)


def test_progress_bar_counts_documents(tokenizer, tmp_path, capsys):
    TokenStream.build(as_dataset(make_texts(20)), tokenizer, tmp_path / "a", progress=False)
    assert "tokenizing" not in capsys.readouterr().err
    TokenStream.build(as_dataset(make_texts(20)), tokenizer, tmp_path / "b")
    captured = capsys.readouterr()
    assert "tokenizing" in captured.err and "20/20" in captured.err and captured.out == ""


def test_splits_that_cannot_be_tokenized(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="no column 'story'; the columns are text, number"):
        TokenStream.build(as_dataset(["a"]), tokenizer, tmp_path, column="story")
    with pytest.raises(ValueError, match="no documents"):
        TokenStream.build(as_dataset([]), tokenizer, tmp_path)
    with pytest.raises(TypeError, match="document 1 is NoneType, not str"):
        TokenStream.build(as_dataset(["a", None]), tokenizer, tmp_path)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------- batches


def test_random_windows_are_a_pure_function_with_targets_one_ahead():
    stream = TokenStream.from_ids(range(1000), vocab_size=1000)
    tokens_BT, targets_BT = stream.random_windows(16, 32, seed=3, step=7)
    assert tokens_BT.shape == targets_BT.shape == (16, 32)
    assert tokens_BT.dtype == targets_BT.dtype == torch.int64
    assert torch.equal(targets_BT, tokens_BT + 1) and torch.equal(tokens_BT[:, 1:], tokens_BT[:, :-1] + 1)
    assert torch.equal(tokens_BT, stream.random_windows(16, 32, seed=3, step=7)[0])
    for other in ({"seed": 3, "step": 8}, {"seed": 4, "step": 7}, {"seed": 7, "step": 3}):
        assert not torch.equal(tokens_BT, stream.random_windows(16, 32, **other)[0])


def test_random_windows_do_not_touch_global_random_state():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    TokenStream.from_ids(range(100), 100).random_windows(4, 8, seed=0, step=0)
    assert torch.equal(torch.rand(1), expected)


def test_random_windows_reach_every_start_equally_often():
    stream = TokenStream.from_ids(range(20), vocab_size=20)
    starts = stream.random_windows(16_000, 4, seed=0, step=0)[0][:, 0]
    counts = torch.bincount(starts, minlength=16)
    assert len(counts) == 16, "20 tokens hold 16 windows of 4 with their targets"
    assert counts.min() > 850 and counts.max() < 1150, counts  # 1,000 each, standard deviation 31


def test_stream_of_exactly_one_window_and_one_token_less():
    tokens_BT, targets_BT = TokenStream.from_ids([5, 6, 7], 10).random_windows(2, 2, seed=0, step=0)
    assert tokens_BT.tolist() == [[5, 6]] * 2 and targets_BT.tolist() == [[6, 7]] * 2
    with pytest.raises(ValueError, match=r"stream has 3 tokens.* seq_len \+ 1 = 4"):
        TokenStream.from_ids([5, 6, 7], 10).random_windows(2, 3, seed=0, step=0)


@given(length=st.integers(2, 80), batch_size=st.integers(1, 5), seq_len=st.integers(1, 30))
@settings(deadline=None)
def test_windows_count_each_target_exactly_once(length, batch_size, seq_len):
    ids = np.random.default_rng(length).permutation(length)
    batches = list(TokenStream.from_ids(ids, vocab_size=length).windows(batch_size, seq_len))
    assert all(
        tokens_BT.shape == targets_BT.shape and tokens_BT.shape[1] == seq_len for tokens_BT, targets_BT in batches
    )
    assert [len(tokens_BT) for tokens_BT, _ in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert len(batches[-1][0]) <= batch_size
    tokens_N = torch.cat([tokens_BT.flatten() for tokens_BT, _ in batches])
    targets_N = torch.cat([targets_BT.flatten() for _, targets_BT in batches])
    real = targets_N != IGNORE
    assert targets_N[real].tolist() == ids[1:].tolist()
    assert tokens_N[real].tolist() == ids[:-1].tolist()
    assert tokens_N.min() >= 0 and tokens_N.max() < length, "padding must be a token of the vocabulary"
    assert len(real) - real.sum() < seq_len, "no row may be padding only"


def test_windows_check_their_arguments():
    with pytest.raises(ValueError, match="at least 2"):
        next(TokenStream.from_ids([1], 10).windows(1, 4))
    with pytest.raises(ValueError, match="batch_size=0 is too small; choose at least 1"):
        next(TokenStream.from_ids([1, 2], 10).windows(0, 4))
    with pytest.raises(ValueError, match="seq_len=0 is too small; choose at least 1"):
        TokenStream.from_ids([1, 2], 10).random_windows(1, 0, seed=0, step=0)


def test_padded_batch_masks_padding():
    tokens_BT, targets_BT = padded_batch([[5, 6, 7], [8, 9], [], [4]], pad_id=1)
    assert tokens_BT.tolist() == [[5, 6, 7], [8, 9, 1], [1, 1, 1], [4, 1, 1]]
    assert targets_BT.tolist() == [[6, 7, -100], [9, -100, -100], [-100] * 3, [-100] * 3]
    assert tokens_BT.dtype == targets_BT.dtype == torch.int64


def test_padded_batch_to_a_length_and_the_trap():
    tokens_BT, targets_BT = padded_batch([[5, 6, 7], [8, 9]], pad_id=0, length=5, mask_padding=False)
    assert tokens_BT.tolist() == [[5, 6, 7, 0, 0], [8, 9, 0, 0, 0]]
    assert targets_BT.tolist() == [[6, 7, 0, 0, 0], [9, 0, 0, 0, 0]]
    masked_BT = padded_batch([[5, 6, 7], [8, 9]], pad_id=0, length=5)[1]
    assert (masked_BT != IGNORE).sum() == 3, "a document of L tokens has L - 1 targets"


def test_padded_batch_takes_documents_cut_from_a_stream(tokenizer, tmp_path, recwarn):
    stream = TokenStream.build(as_dataset(["abc", "a b"]), tokenizer, tmp_path, progress=False)
    documents = np.split(stream.tokens, np.cumsum(stream.document_lengths)[:-1])
    expected = padded_batch(encode_documents(tokenizer, ["abc", "a b"]), pad_id=0)
    assert all(map(torch.equal, padded_batch(documents, pad_id=0), expected)) and not list(recwarn)


def test_padding_keeps_a_pad_id_that_is_a_real_target():
    assert padded_batch([[5, 2], [5, 6, 2]], pad_id=2)[1].tolist() == [[2, -100, -100], [6, 2, -100]]


def test_padded_batch_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="3 tokens but length=2"):
        padded_batch([[1], [1, 2, 3]], pad_id=0, length=2)
    with pytest.raises(ValueError, match="at least one document"):
        padded_batch([], pad_id=0)


def test_ids_outside_the_vocabulary_are_refused(tokenizer, tmp_path, monkeypatch):
    for bad in ([0, 10], [-1, 3]):
        with pytest.raises(ValueError, match=r"token id (10|-1) is outside the vocabulary 0\.\.9"):
            TokenStream.from_ids(bad, vocab_size=10)
    for bad in ([], [[1]], [0.5]):
        with pytest.raises(ValueError, match="non-empty list of integers"):
            TokenStream.from_ids(bad, vocab_size=10)
    monkeypatch.setattr(stream_files, "framed", lambda *_: [[1, 400, 2]])
    with pytest.raises(ValueError, match=r"token id 400 is outside the vocabulary 0\.\.399"):
        TokenStream.build(as_dataset(["a"]), tokenizer, tmp_path, progress=False)


def test_streams_from_ids_are_keyed_by_content():
    keys = [TokenStream.from_ids(ids, size).key for ids, size in (([1, 2], 5), ([1, 2], 6), ([2, 1], 5), ([1, 2], 5))]
    assert len(set(keys)) == 3 and keys[0] == keys[3]


def test_a_stream_says_whose_tokens_its_windows_show():
    """Documents of 3, 1 and 4 tokens, rows 7, 2 and 5; a window's last target counts as shown."""
    ids = np.array([1, 1, 1, 2, 3, 3, 3, 3], np.uint16)
    stream = TokenStream(ids, np.array([3, 1, 4]), 10, "key", document_ids=np.array([7, 2, 5]))
    row_of = {1: 7, 2: 2, 3: 5}
    for step in range(30):
        inputs, targets = stream.random_windows(2, 2, seed=0, step=step)
        shown = sorted({row_of[id] for id in torch.cat([inputs, targets], 1).flatten().tolist()})
        assert stream.random_document_ids(2, 2, seed=0, step=step).tolist() == shown
    assert TokenStream.from_ids([1, 2], 5).document_ids.tolist() == [0]
    with pytest.raises(ValueError, match="2 ids for 3 documents"):
        TokenStream(ids, np.array([3, 1, 4]), 10, "key", document_ids=np.array([7, 2]))


# ----------------------------------------------------------------------------------------------------- real data


@pytest.mark.skipif(not DATA.exists(), reason="the real stories are not here")
def test_all_real_stories_come_back(tmp_path):
    lines = (DATA / "tinystories_valid.jsonl").read_text(encoding="utf-8").splitlines()
    stories = [json.loads(line)["text"] for line in lines]
    tokenizer = train_tokenizer(stories)
    stream = TokenStream.build(as_dataset(stories), tokenizer, tmp_path, progress=False)
    pieces = np.split(stream.tokens, np.cumsum(stream.document_lengths)[:-1])
    assert tokenizer.decode_batch([piece.tolist() for piece in pieces]) == stories
    assert 3.5 < bytes_per_token(tokenizer, stories) < 4.1


@pytest.mark.skipif(not DATA.exists(), reason="GPT-2's tokenizer is not here")
def test_gpt2_from_a_folder(tmp_path):
    gpt2 = load_tokenizer(DATA / "gpt2")
    assert bos_eos(gpt2) == (None, 50256)
    assert encode_document(gpt2, "Hello world") == [15496, 995, 50256]
    assert encode_prompt(gpt2, "Hello world") == [50256, 15496, 995]
    texts = [*make_texts(5), *NASTY, "<|endoftext|>"]
    stream = TokenStream.build(as_dataset(texts), gpt2, tmp_path, progress=False)
    pieces = np.split(stream.tokens, np.cumsum(stream.document_lengths)[:-1])
    assert [gpt2.decode(piece.tolist()) for piece in pieces] == texts
    assert (stream.tokens == 50256).sum() == len(texts), "<|endoftext|> in a text must not end a document"
    assert (stream.vocab_size, stream.tokens.dtype) == (50257, np.uint16)
