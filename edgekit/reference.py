"""Objects named on the command line: `package.module:function`, or `path/file.py:function`."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from edgekit.errors import EdgekitError
from edgekit.words import nearest


def resolve_reference(text: str, *, error: type[EdgekitError], what: str) -> object:
    """The object that `text` names, in a module (the current folder is importable) or in a Python file.

    Args:
        text: `package.module:name` or `path/file.py:name`; the name may have dots.
        error: the class to raise.
        what: what the reference is for, which begins every message ("calibration data", "model factory").

    Raises:
        EdgekitError: of the class `error`, when the text has no name, the file, the module or the name does not exist,
            or the module itself raises on import.
    """
    location, colon, names = text.rpartition(":")
    if not (colon and location and names):
        raise error(f"{what} {text!r}: expected package.module:function or path/file.py:function")
    if location.endswith(".py"):
        found: object = _load_file(Path(location), text, error, what)
    else:
        found = _import(location, text, error, what)
    for name in names.split("."):
        if not hasattr(found, name):
            raise error(f"{what} {text!r}: {location} has no {name!r}; {_near(name, found)}")
        found = getattr(found, name)
    return found


@contextmanager
def user_code(error: type[EdgekitError], what: str) -> Iterator[None]:
    """Turn whatever the user's own code raises into `error`, which names the exception, its file and its line.

    Raises:
        EdgekitError: of the class `error`; one that edgekit raised inside passes through as it is.
    """
    try:
        yield
    except EdgekitError:
        raise
    except (Exception, SystemExit) as raised:  # the one place where anything may come: this code is not edgekit's
        raise error(f"{what} raised {_describe(raised)}") from raised


def _load_file(path: Path, text: str, error: type[EdgekitError], what: str) -> ModuleType:
    if not path.is_file():
        raise error(f"{what} {text!r}: the file {str(path)!r} does not exist; give its path from the current folder")
    full = path.resolve()
    # One module for one state of one file: two references into it share it, an edited file is read again.
    state = f"{full}:{full.stat().st_mtime_ns}:{full.stat().st_size}"
    name = f"_edgekit_{full.stem}_{hashlib.sha256(state.encode()).hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, full)
    assert spec is not None and spec.loader is not None, "a .py file always has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        with _importable(full.parent), user_code(error, f"{what} {text!r}: {path}, when loaded,"):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _import(name: str, text: str, error: type[EdgekitError], what: str) -> ModuleType:
    if not all(part.isidentifier() for part in name.split(".")):
        raise error(f"{what} {text!r}: {name!r} is neither a module's name nor a .py file")
    with _importable(Path.cwd()), user_code(error, f"{what} {text!r}: the module {name}, when imported,"):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as missing:
            if missing.name is None or not f"{name}.".startswith(f"{missing.name}."):
                raise  # it is there, but one of its own imports is not
            raise error(
                f"{what} {text!r}: there is no module {missing.name!r} in the current folder or installed; "
                f"check the name, or give the file as path/file.py:function"
            ) from missing


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """`folder` first on the import path; it stays at the end, for what the module imports later."""
    importlib.invalidate_caches()
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        if str(folder) not in sys.path:
            sys.path.append(str(folder))


def _near(name: str, owner: object) -> str:
    known = [known for known in dir(owner) if not known.startswith("_")]
    near = nearest(name, known, cutoff=0.6)
    if near:
        return f"did you mean {near!r}?"
    return f"it has {', '.join(known[:8])}" if known else "it is empty"


def _describe(raised: BaseException) -> str:
    """`KeyError: 'image' (calibration.py, line 12)`: the last line in the file that edgekit called into."""
    message = f"{type(raised).__name__}: {raised}" if str(raised) else type(raised).__name__
    if isinstance(raised, SyntaxError):
        return message  # says its file and line itself
    not_theirs = ("<frozen", str(Path(__file__).parent), str(Path(importlib.__file__).parent))
    frames = [
        frame for frame in traceback.extract_tb(raised.__traceback__) if not frame.filename.startswith(not_theirs)
    ]
    if not frames:
        return message
    last = [frame for frame in frames if frame.filename == frames[0].filename][-1]
    return f"{message} ({Path(last.filename).name}, line {last.lineno})"
