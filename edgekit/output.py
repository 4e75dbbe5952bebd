"""Writing results so that an interrupted run leaves the previous result or nothing, never half a file.

Everything is written under a hidden name beside its final place, and takes that place when it is complete. What a killed run left
under such a name is removed by the next one that writes there.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from edgekit.errors import OutputError


def check_folder(path: Path, *, marker: str, what: str) -> None:
    """Make sure that edgekit may write to the folder `path`, without a trace: it is new, empty, or holds the file `marker`.

    Raises:
        OutputError: it is a file, holds other people's files, or cannot be written.
    """
    if path.exists() and not path.is_dir():
        raise OutputError(f"{path}: is a file; give a folder for {what}")
    try:
        strange = path.is_dir() and any(path.iterdir()) and not _is_ours(path, marker)
        existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise _unwritable(path, error) from error
    if strange:
        raise OutputError(
            f"{path}: is not empty and holds no {marker}, so it is not {what}; give a new or empty folder"
        )


@contextmanager
def staged_folder(final: Path, *, marker: str, what: str) -> Iterator[Path]:
    """A temporary folder beside `final` that takes its place when the block ends well, and goes away when it does not.

    Raises:
        OutputError: `final` is not edgekit's to replace, or cannot be written.
    """
    check_folder(final, marker=marker, what=what)
    with _stage(final.parent, f".{final.name}.partial-") as stage:
        yield stage
        stage.chmod(0o777 & ~_umask())
        old = stage.with_name(f"{stage.name}-old")
        if final.exists():
            final.rename(old)
        try:
            stage.rename(final)
        except OSError:
            if old.exists():
                old.rename(final)
            raise
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def replaced_files(folder: Path, marker: str) -> Iterator[Path]:
    """A temporary folder whose files and folders move into `folder` together when the block ends well; what else is there stays.

    The file `marker` says that the set is complete: it goes first and comes back last, so that an interruption in between leaves
    nothing rather than a mixture.

    Raises:
        OutputError: `folder` cannot be written.
    """
    with _stage(folder, ".partial-") as stage:
        yield stage
        (folder / marker).unlink(missing_ok=True)
        for file in sorted(stage.iterdir(), key=lambda file: file.name == marker):
            if (folder / file.name).is_dir():
                shutil.rmtree(folder / file.name)
            file.replace(folder / file.name)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all; its folder is made where it is missing.

    Raises:
        OutputError: it cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise _unwritable(path, error) from error


def sha256(path: Path) -> str:
    """The SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _stage(parent: Path, prefix: str) -> Iterator[Path]:
    """A new folder in `parent`, removed at the end; those of killed runs go first."""
    is_new = not parent.exists()
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for left_over in [path for path in parent.iterdir() if path.name.startswith(prefix)]:
            shutil.rmtree(left_over)
        stage = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    except OSError as error:
        raise _unwritable(parent, error) from error
    try:
        yield stage
    except OSError as error:
        raise _unwritable(parent, error) from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        if is_new and not any(parent.iterdir()):
            parent.rmdir()


def _is_ours(folder: Path, marker: str) -> bool:
    """Whether edgekit wrote it, or was killed while it did."""
    return (folder / marker).is_file() or any(folder.glob(".*partial-*"))


def _unwritable(path: Path, error: OSError) -> OutputError:
    return OutputError(
        f"{path}: cannot be written ({error.strerror or error}); free space there, or choose another output folder"
    )


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
