"""Files that are whole or not there."""

import os
import subprocess
import sys

import pytest

from upcycling.files import replacing, write_text


def test_a_file_appears_whole_and_nothing_else_stays(tmp_path):
    path = tmp_path / "made" / "on the way" / "a.txt"
    write_text(path, "one\ntwo\n")
    assert path.read_bytes() == b"one\ntwo\n"
    write_text(path, "ä")
    assert path.read_text(encoding="utf-8") == "ä"
    assert [file.name for file in path.parent.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt("stop")])
def test_what_the_block_raises_leaves_the_former_file_and_no_other(tmp_path, error):
    path = tmp_path / "a.txt"
    write_text(path, "before")
    with pytest.raises(type(error), match=str(error)), replacing(path) as temporary:
        temporary.write_text("half of")
        raise error
    assert path.read_text() == "before" and [*tmp_path.iterdir()] == [path]


def test_the_file_and_its_folder_are_flushed_before_and_after_the_rename(tmp_path, monkeypatch):
    path, events = tmp_path / "a.txt", []
    fsync, rename = os.fsync, os.replace
    monkeypatch.setattr(
        "os.fsync", lambda number: (events.append(os.readlink(f"/proc/self/fd/{number}")), fsync(number))
    )
    monkeypatch.setattr("os.replace", lambda old, new: (events.append("renamed"), rename(old, new)))
    if not os.path.exists("/proc/self/fd"):
        pytest.skip("which file was flushed is found out through /proc")
    write_text(path, "x")
    assert events == [f"{path}.{os.getpid()}.tmp", "renamed", str(tmp_path)]


def test_what_a_killed_process_left_goes_and_a_living_ones_file_stays(tmp_path):
    path = tmp_path / "a[1].txt"
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    leftover, living = tmp_path / f"a[1].txt.{int(dead.stdout)}.tmp", tmp_path / f"a[1].txt.{os.getppid()}.tmp"
    foreign = tmp_path / "a[1].txt.old.tmp"
    for file in (leftover, living, foreign):
        file.write_text("x")
    write_text(path, "new")
    assert sorted(tmp_path.iterdir()) == sorted([path, living, foreign])


def test_processes_that_write_one_file_at_once_leave_one_of_their_contents(tmp_path):
    code = (
        "import sys; from upcycling.files import write_text\n"
        "for _ in range(50): write_text(sys.argv[1], sys.argv[2] * 1000)"
    )
    runs = [subprocess.Popen([sys.executable, "-c", code, tmp_path / "a.txt", letter]) for letter in "ab"]
    assert [run.wait() for run in runs] == [0, 0]
    assert set((tmp_path / "a.txt").read_text()) in ({"a"}, {"b"}) and len([*tmp_path.iterdir()]) == 1


def test_a_file_that_cannot_be_written_is_one_sentence_with_the_path_and_the_remedy(tmp_path):
    (tmp_path / "a").write_text("a file, no folder")
    with pytest.raises(OSError, match=r"could not write .*a.b\.txt .*choose another folder; the former file is intact"):
        write_text(tmp_path / "a" / "b.txt", "x")
