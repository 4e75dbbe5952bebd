"""The house rules that a reader may rely on: who imports whom, how long files and functions are, what `import edgekit` costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CONVERTERS = ("edgekit_onnxruntime", "edgekit_openvino", "edgekit_tensorrt")

LEVELS = (
    "errors",
    "words",
    "progress reference output toml_file boxes channels",
    "quant channel_choice",
    "method schedule target distribution departure distillation pruning frontier",
    "finetune allocation",
    "data graph trials",
    "passes calibration lowering layer_shape",
    "training backend",
    "worker records",
    "pictures worker_process kept_workers",
    "measure metric proof report",
    "beside",
    "sensitivity tuning proxy latency_table",
    "lift search",
    "pipelines",
    "console options",
    "demo",
    "cli",
)
"""The rooms of edgekit/, lowest first: a room imports only from rooms below its own level."""
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms.split()}

OPEN_TO_CONVERTERS = {"errors", "quant", "target", "graph", "lowering", "backend"}
MOST_LINES, MOST_FUNCTION_LINES = 400, 60


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of each module, or name in a package, that a file imports anywhere."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def room_of(path: Path) -> str:
    return path.relative_to(ROOT / "edgekit").parts[0].removesuffix(".py")


def imported_room(name: str) -> str | None:
    """The room of edgekit that an imported name lives in; None for other packages and for `edgekit` itself."""
    parts = name.split(".")
    return parts[1] if parts[0] == "edgekit" and len(parts) > 1 and parts[1] in LEVEL else None


def test_every_room_has_its_level() -> None:
    rooms = {room_of(path) for path in sources("edgekit")} - {"__init__"}
    assert rooms == set(LEVEL)


@pytest.mark.parametrize("path", sources("edgekit"), ids=lambda path: str(path.relative_to(ROOT)))
def test_rooms_import_downwards_only(path: Path) -> None:
    room = room_of(path)
    if room == "__init__":
        return
    for line, name in imports(path):
        imported = imported_room(name)
        if imported is not None and imported != room:
            assert LEVEL[imported] < LEVEL[room], f"{path}:{line}: {room} imports {name}"


def test_passes_do_not_import_each_other() -> None:
    wrong = [
        f"{path}:{line}: {name}"
        for path in sources("edgekit/passes")
        for line, name in imports(path)
        if name.startswith("edgekit.passes")
    ]
    assert not wrong


def test_only_training_imports_torch() -> None:
    wrong = [
        f"{path}:{line}: {name}"
        for path in sources("edgekit")
        for line, name in imports(path)
        if name.split(".")[0] in ("torch", "torchvision", "accelerate", "torch_pruning") and room_of(path) != "training"
    ]
    assert not wrong


def test_edgekit_knows_no_runtime_but_onnx_runtime() -> None:
    wrong = [
        f"{path}:{line}: {name}"
        for path in sources("edgekit")
        for line, name in imports(path)
        if name.split(".")[0] in (*CONVERTERS, "openvino", "tensorrt", "tensorrt_rtx")
    ]
    assert not wrong


@pytest.mark.parametrize("converter", CONVERTERS)
def test_converters_see_a_part_of_edgekit_and_never_each_other(converter: str) -> None:
    for path in sources(f"converters/{converter}"):
        for line, name in imports(path):
            package = name.split(".")[0]
            assert package not in (*CONVERTERS, "torch") or package == converter, f"{path}:{line}: {name}"
            assert package != "edgekit" or imported_room(name) in OPEN_TO_CONVERTERS, f"{path}:{line}: {name}"


@pytest.mark.parametrize(
    "path", [*sources("edgekit"), *sources("converters")], ids=lambda path: str(path.relative_to(ROOT))
)
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MOST_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = lines_of_code(node)
            assert length <= MOST_FUNCTION_LINES, f"{path}:{node.lineno}: {node.name} has {length} lines"


def lines_of_code(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """From `def` to the end, without the docstring."""
    first = function.body[0]
    documented = isinstance(first, ast.Expr) and ast.get_docstring(function) is not None
    documentation = (first.end_lineno or 0) - first.lineno + 1 if documented else 0
    return (function.end_lineno or 0) - function.lineno + 1 - documentation


def test_importing_edgekit_imports_nothing_else() -> None:
    code = "import sys, edgekit; print(*{name.split('.')[0] for name in sys.modules if '.' not in name})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"click", "numpy", "onnx", "onnx_ir", "onnxruntime", "pydantic", "rich", "torch"}
    assert "edgekit" in done.stdout.split()
    assert not heavy & set(done.stdout.split())


def test_a_worker_starts_without_the_ir() -> None:
    """Each artifact is loaded by a process of its own: what is not for running graphs would cost half of its start."""
    loading = "edgekit.worker_process, edgekit_onnxruntime.session, edgekit_openvino.compiled, edgekit_tensorrt.engine"
    backends = ", ".join(f"{converter}.backend" for converter in CONVERTERS)
    code = f"import sys, {loading}, {backends}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "edgekit_openvino.compiled" in done.stdout.split()
    assert not {"onnx", "onnx_ir", "torch", "rich"} & set(done.stdout.split())
