"""Opening torch files without running what is hidden in them.

A checkpoint is a pickle, and unpickling can call any function; torch's own `weights_only` loader cannot.
A `torch.export` program is a zip that torch unpickles member by member, and its JSON is no safer: torch evaluates the
guards and the symbolic shapes in it, and pastes the names of inputs into Python source. So every member is screened
first, and torch is then given a copy made of the screened members, never the file itself.
"""

from __future__ import annotations

import ast
import io
import json
import pickle
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch

from edgekit.errors import SourceError, UntrustedSourceError

UNREADABLE = (
    *(RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, EOFError, OSError, ImportError),
    *(pickle.UnpicklingError, struct.error, zlib.error, zipfile.BadZipFile),
)
"""What torch, pickle and zipfile raise on files that are damaged or of another kind."""

REMEDY = "re-save its state_dict, or pass --trust-checkpoint if you trust whoever made the file"

_PICKLE_STARTS = (b"PK", b"\x80")
_INERT = re.compile(
    r"[^/]+/(data/weights/weight_\d+|data/constants/tensor_\d+|\.data/\w+|archive_format|archive_version|byteorder|"
    r"extra/.+)"
)
_NOTES = re.compile("stack_trace|nn_module_stack|torch_fn|source_fn_stack|from_node|custom|torch_version")
_PLAIN = re.compile(r"[\w.:,<>#/+*\-' \[\]]*")
_SYMBOLIC_CALL = re.compile(
    "Symbol|Integer|Float|Rational|Add|Mul|Pow|Max|Min|Mod|Abs|Piecewise|ExprCondPair|floor|ceiling|sign|sqrt|log|exp|"
    "Eq|Ne|Lt|Le|Gt|Ge|Equality|Unequality|StrictLessThan|LessThan|StrictGreaterThan|GreaterThan|And|Or|Not|"
    "FloorDiv|ModularIndexing|Where|PythonMod|CleanDiv|CeilToInt|FloorToInt|CeilDiv|LShift|RShift|PowByNatural|"
    "FloatPow|FloatTrueDiv|IntTrueDiv|IsNonOverlappingAndDenseIndicator|TruncToFloat|TruncToInt|RoundToInt|"
    "RoundDecimal|ToFloat|Identity"
)
_SYMBOLIC_SYNTAX = (
    *(ast.Expression, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.Call, ast.keyword, ast.Name, ast.Constant),
    *(ast.operator, ast.unaryop, ast.boolop, ast.cmpop, ast.expr_context, ast.Tuple),
)


def load_pickle(source: Path | io.BytesIO, name: str, *, trust: bool = False) -> object:
    """What `torch.save` wrote, on the CPU. `name` stands for the source in messages.

    Raises:
        SourceError: it is truncated, or no torch file.
        UntrustedSourceError: without `trust`, when reading it means running pickled code.
    """
    start = _first_bytes(source)
    if not start.startswith(_PICKLE_STARTS):
        found = f"starts with {start!r}" if start else "is empty"
        raise SourceError(f"{name} is not a PyTorch checkpoint: it {found}; give a file that torch.save wrote")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(source, map_location="cpu", weights_only=not trust)
    except pickle.UnpicklingError as error:
        if trust:
            raise SourceError(f"{name} cannot be unpickled: {first_line(error)}; get it again or re-save it") from error
        raise UntrustedSourceError(f"{name} needs pickled code: {_asked_for(error)}; {REMEDY}") from None
    except (AttributeError, ImportError) as error:
        raise SourceError(
            f"{name} holds objects whose Python code is missing here: {first_line(error)}; "
            "put that code on the Python path, or re-save a state_dict"
        ) from error
    except UNREADABLE as error:
        if "TorchScript" in str(error):
            raise SourceError(f"{name} is a TorchScript archive; re-save the model's state_dict") from None
        raise SourceError(f"{name} is truncated or damaged ({first_line(error)}); copy or download it again") from error


def screened_program(path: Path) -> io.BytesIO:
    """A copy of a `torch.export` archive that can only hold data and operators: torch may open it.

    Raises:
        SourceError: it is truncated, or no `.pt2` archive.
        UntrustedSourceError: a member would run code when torch opens it.
    """
    copy = io.BytesIO()
    try:
        with zipfile.ZipFile(path) as archive, zipfile.ZipFile(copy, "w") as out:
            pickled = _pickled_members(archive)
            for info in archive.infolist():
                member = f"{path}, member {info.filename!r},"
                content = archive.read(info)
                if _is_inert(info.filename, pickled):
                    out.writestr(info.filename, content)
                elif info.filename.endswith(".json"):
                    out.writestr(info.filename, json.dumps(_screened_json(content, member)))
                else:
                    _screen_pickle(content, member)
                    out.writestr(info.filename, content)
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, struct.error, UnicodeDecodeError) as error:
        raise SourceError(f"{path} is truncated or not a torch.export archive ({first_line(error)})") from error
    copy.seek(0)
    return copy


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its class where it has none; nothing that colours a terminal."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__


def _first_bytes(source: Path | io.BytesIO) -> bytes:
    if isinstance(source, io.BytesIO):
        return source.getvalue()[:12]
    with source.open("rb") as file:
        return file.read(12)


def _asked_for(error: pickle.UnpicklingError) -> str:
    """What the restricted unpickler stopped at."""
    asked = re.search(r"GLOBAL ([\w.]+\w)", str(error))
    if asked:
        return f"it asks for {asked[1]}"
    operand = re.search(r"Unsupported operand \d+", str(error))
    if operand:
        return f"it uses more of pickle than tensors need ({operand[0].lower()})"
    return str(error).split("WeightsUnpickler error:")[-1].strip().split("\n")[0]


def _pickled_members(archive: zipfile.ZipFile) -> frozenset[str]:
    """Base names of the tensors that the archive's own tables mark as pickled."""
    names = set()
    for info in archive.infolist():
        if info.filename.endswith(".json"):
            for entry in _objects(_json(archive.read(info), info.filename)):
                if entry.get("use_pickle"):
                    names.add(str(entry.get("path_name")).rpartition("/")[2])
    return frozenset(names)


def _is_inert(filename: str, pickled: frozenset[str]) -> bool:
    """Whether torch reads a member as plain bytes: raw tensors and the archive's markers."""
    return _INERT.fullmatch(filename) is not None and filename.rpartition("/")[2] not in pickled


def _screen_pickle(content: bytes, member: str) -> None:
    if "/aotinductor/" in member:
        raise UntrustedSourceError(f"{member} is compiled code; save the program with torch.export.save")
    if not content:
        return
    try:
        load_pickle(io.BytesIO(content), member)
    except UntrustedSourceError:
        raise
    except SourceError as error:
        raise UntrustedSourceError(f"{member} is neither tensors nor JSON, so it is not opened; {REMEDY}") from error


def _screened_json(content: bytes, member: str) -> object:
    if "/aotinductor/" in member:
        raise UntrustedSourceError(f"{member} belongs to compiled code; save the program with torch.export.save")
    document = _json(content, member)
    for entry in _objects(document):
        if "guards_code" in entry:
            entry["guards_code"] = []  # torch runs them as Python; they only restrict the inputs
    for key, text in _strings(document):
        if not _is_harmless(key, text):
            raise UntrustedSourceError(
                f"{member} has Python code where {key or 'a name'!r} belongs: {text!r}; {REMEDY}"
            )
    return document


def _json(content: bytes, member: str) -> object:
    try:
        return json.loads(content)
    except ValueError as error:
        raise SourceError(f"{member} is not JSON ({error}); save the program again with torch.export.save") from error


def _objects(document: object) -> Iterator[dict[str, object]]:
    if isinstance(document, dict):
        yield document
    for child in _children(document):
        yield from _objects(child)


def _children(document: object) -> list[object]:
    if isinstance(document, dict):
        return list(document.values())
    return list(document) if isinstance(document, list) else []


def _strings(document: object, key: str = "") -> Iterator[tuple[str, str]]:
    """Every string, with the key that it is the value of; keys, and strings in lists, are without one."""
    if isinstance(document, str):
        yield key, document
    elif isinstance(document, dict):
        for name, child in document.items():
            yield "", name
            yield from _strings(child, name)
    elif isinstance(document, list):
        for child in document:
            yield from _strings(child)


def _is_harmless(key: str, text: str) -> bool:
    if key == "expr_str":
        return _is_symbolic(text)
    if key in ("in_spec", "out_spec"):
        return "__enum__" not in text and "default_factory_module" not in text  # both import the module they name
    return _NOTES.fullmatch(key) is not None or _PLAIN.fullmatch(text) is not None


def _is_symbolic(text: str) -> bool:
    """Whether an expression is arithmetic on symbols, as the shapes of a program are."""
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError):
        return False
    return all(_is_arithmetic(node) for node in ast.walk(tree))


def _is_arithmetic(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and _SYMBOLIC_CALL.fullmatch(node.func.id) is not None
    if isinstance(node, ast.Constant) and isinstance(node.value, str | bytes):
        return re.fullmatch(r"[\w.+-]+", str(node.value)) is not None
    return isinstance(node, _SYMBOLIC_SYNTAX)
