"""Writing results so that an interrupted run leaves the previous result or nothing, never half a file."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgekit.errors import OutputError


def prepare_folder(path: Path, *, marker: str, what: str) -> None:
    """Make sure that `path` is a folder that edgekit may write to: new, empty, or its own (it holds the file `marker`).

    Raises:
        OutputError: it is a file, holds other people's files, or cannot be written.
    """
    if path.exists() and not path.is_dir():
        raise OutputError(f"{path}: is a file; give a folder for {what}")
    if path.is_dir() and any(path.iterdir()) and not (path / marker).is_file():
        raise OutputError(
            f"{path}: is not empty and holds no {marker}, so it is not {what}; give a new or empty folder"
        )
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written ({error.strerror or error}); choose another output folder"
        ) from error


@contextmanager
def staged_folder(final: Path, *, marker: str, what: str) -> Iterator[Path]:
    """A temporary folder beside `final` that takes its place when the block ends well, and goes away when it does not.

    Raises:
        OutputError: `final` is not edgekit's to replace, or cannot be written.
    """
    prepare_folder(final, marker=marker, what=what)
    stage = Path(tempfile.mkdtemp(prefix=f".{final.name}.partial-", dir=final.parent))
    old = stage.with_name(stage.name + "-old")
    try:
        yield stage
        stage.chmod(0o777 & ~_umask())
        final.rename(old)
        stage.rename(final)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        if old.is_dir() and not final.exists():
            old.rename(final)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def replaced_files(folder: Path, marker: str) -> Iterator[Path]:
    """A temporary folder whose files move into `folder` together when the block ends well; other files there stay.

    The file `marker` says that the set is complete: it goes first and comes back last, so that an interruption in between leaves
    nothing rather than a mixture.
    """
    stage = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder))
    try:
        yield stage
        (folder / marker).unlink(missing_ok=True)
        for file in sorted(stage.iterdir(), key=lambda file: file.name == marker):
            file.replace(folder / file.name)
    except OSError as error:
        raise OutputError(
            f"{folder}: cannot be written ({error.strerror or error}); free space or choose another folder"
        ) from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written ({error.strerror or error}); choose another output folder"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """The SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
