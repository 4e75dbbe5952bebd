from __future__ import annotations

import os
import stat
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edgekit.errors import OutputError
from edgekit.output import check_folder, replaced_files, sha256, staged_folder, write_text

Snapshot = Callable[[Path], dict[str, str]]
OURS = {"marker": "marker.json", "what": "an edgekit folder"}


@pytest.fixture
def previous(tmp_path: Path) -> Path:
    """A complete result."""
    folder = tmp_path / "previous"
    folder.mkdir()
    for name in ("a.bin", "b.bin", "marker.json"):
        (folder / name).write_text(f"old {name}")
    return folder


def test_a_new_an_empty_and_an_own_folder_may_be_written_and_are_left_alone(
    tmp_path: Path, previous: Path, snapshot: Snapshot
) -> None:
    (tmp_path / "empty").mkdir()
    before = snapshot(tmp_path)
    for folder in (tmp_path / "new" / "below", tmp_path / "empty", previous):
        check_folder(folder, **OURS)
    assert snapshot(tmp_path) == before


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(OutputError, match=r"is not empty and holds no marker\.json, .* give a new or empty folder"):
        check_folder(tmp_path, **OURS)


@pytest.mark.parametrize("below", ["", "out", "out/deeper"])
def test_a_file_in_the_way_is_refused(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match=r"file.*: (is a file|cannot be written)"):
        check_folder(tmp_path / "file" / below, **OURS)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a file system that nobody can write to")
def test_a_folder_that_nobody_can_write_is_refused() -> None:
    with pytest.raises(OutputError, match=r"/proc/edgekit: cannot be written \(.+\); .*choose another output folder"):
        check_folder(Path("/proc/edgekit"), **OURS)


def test_a_staged_folder_takes_the_place_of_the_old_one(tmp_path: Path, previous: Path, snapshot: Snapshot) -> None:
    with staged_folder(previous, **OURS) as stage:
        (stage / "marker.json").write_text("new")
        assert (previous / "marker.json").read_text() == "old marker.json"
    assert list(snapshot(tmp_path)) == ["previous", "previous/marker.json"]
    assert (previous / "marker.json").read_text() == "new"
    os.umask(mask := os.umask(0))
    assert stat.S_IMODE(previous.stat().st_mode) == 0o777 & ~mask


def test_a_staged_folder_that_fails_leaves_no_trace(tmp_path: Path, previous: Path, snapshot: Snapshot) -> None:
    before = snapshot(tmp_path)
    for final in (previous, tmp_path / "new", tmp_path / "deep" / "new"):
        with pytest.raises(ZeroDivisionError), staged_folder(final, **OURS) as stage:
            (stage / "marker.json").write_text("new")
            raise ZeroDivisionError
        assert snapshot(tmp_path) == before


def test_replaced_files_leave_other_files_alone(previous: Path) -> None:
    (previous / "exports").mkdir()
    (previous / "notes.txt").write_text("mine")
    with replaced_files(previous, "marker.json") as stage:
        (stage / "a.bin").write_text("new a.bin")
        (stage / "marker.json").write_text("new marker.json")
    assert {path.name: path.read_text() for path in previous.iterdir() if path.is_file()} == {
        "a.bin": "new a.bin",
        "b.bin": "old b.bin",
        "marker.json": "new marker.json",
        "notes.txt": "mine",
    }
    assert (previous / "exports").is_dir()


def test_replaced_files_that_fail_leave_no_trace(tmp_path: Path, previous: Path, snapshot: Snapshot) -> None:
    before = snapshot(tmp_path)
    for folder in (previous, tmp_path / "new"):
        with pytest.raises(ZeroDivisionError), replaced_files(folder, "marker.json") as stage:
            (stage / "marker.json").write_text("new")
            raise ZeroDivisionError
        assert snapshot(tmp_path) == before


def test_a_disk_that_fills_up_is_said_and_leaves_no_trace(tmp_path: Path, previous: Path, snapshot: Snapshot) -> None:
    before = snapshot(tmp_path)
    full = pytest.raises(OutputError, match=r"cannot be written \(No space left on device\); free space there")
    for folder in (previous, tmp_path / "new"):
        with full, replaced_files(folder, "marker.json"):
            Path("/dev/full").write_text("new")
        with full, staged_folder(folder, **OURS):
            Path("/dev/full").write_text("new")
        assert snapshot(tmp_path) == before


def test_write_text_replaces_a_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "report.md"
    write_text(path, "first")
    write_text(path, "zweite Fassung: äöü")
    assert path.read_text(encoding="utf-8") == "zweite Fassung: äöü"
    assert [entry.name for entry in path.parent.iterdir()] == ["report.md"]


def test_write_text_says_when_it_cannot(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match=r"file/report\.md: cannot be written"):
        write_text(tmp_path / "file" / "report.md", "text")


def test_sha256_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    assert sha256(tmp_path / "file") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


REPLACE = """
    from edgekit.output import replaced_files
    with replaced_files(out, "marker.json") as stage:
        for name in ("a.bin", "b.bin", "marker.json"):
            (stage / name).write_text(f"new {name}")
"""
STAGE = """
    from edgekit.output import staged_folder
    with staged_folder(out / "export", marker="marker.json", what="an export") as stage:
        for name in ("a.bin", "b.bin", "marker.json"):
            (stage / name).write_text(f"new {name}")
"""


def complete(folder: Path) -> str:
    """Which version of the result is in a folder ("old" or "new"), or "" when there is none; anything else is a mixture."""
    if not (folder / "marker.json").is_file():
        return ""
    versions = {(folder / name).read_text().split()[0] for name in ("a.bin", "b.bin", "marker.json")}
    assert len(versions) == 1, versions
    return versions.pop()


def test_files_that_a_kill_interrupts_are_the_old_ones_or_none_and_the_next_run_cleans_up(
    previous: Path, killed: Callable[..., Iterator[Path]], snapshot: Snapshot
) -> None:
    found = []
    for out in killed(textwrap.dedent(REPLACE), previous=previous):
        found.append(complete(out))
        check_folder(out, **OURS)
        with replaced_files(out, "marker.json") as stage:
            for name in ("a.bin", "b.bin", "marker.json"):
                (stage / name).write_text(f"newer {name}")
        assert list(snapshot(out)) == ["a.bin", "b.bin", "marker.json"]
        assert complete(out) == "newer"
    assert found[0] == "old"
    assert "" in found
    assert found[-1] == "new"
    assert found == sorted(found, key=["old", "", "new"].index)


def test_a_first_run_that_is_killed_leaves_nothing_that_stops_the_next(killed: Callable[..., Iterator[Path]]) -> None:
    for out in killed(textwrap.dedent(REPLACE)):
        assert complete(out) in ("", "new")
        check_folder(out, **OURS)


def test_a_folder_that_a_kill_interrupts_is_the_old_one_or_none_and_the_next_run_cleans_up(
    tmp_path: Path, previous: Path, killed: Callable[..., Iterator[Path]], snapshot: Snapshot
) -> None:
    exports = tmp_path / "exports"
    exports.mkdir()
    previous.rename(exports / "export")
    found = []
    for out in killed(textwrap.dedent(STAGE), previous=exports):
        found.append(complete(out / "export"))
        with staged_folder(out / "export", **OURS) as stage:
            (stage / "marker.json").write_text("newer")
        assert list(snapshot(out)) == ["export", "export/marker.json"]
    assert found[0] == "old"
    assert found[-1] == "new"
    assert found == sorted(found, key=["old", "", "new"].index)


def test_runs_for_two_targets_do_not_disturb_each_other(tmp_path: Path) -> None:
    with staged_folder(tmp_path / "a", **OURS) as first, staged_folder(tmp_path / "b", **OURS) as second:
        (first / "marker.json").write_text("a")
        (second / "marker.json").write_text("b")
    assert [(tmp_path / name / "marker.json").read_text() for name in "ab"] == ["a", "b"]
