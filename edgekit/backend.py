"""What a runtime plug-in offers, and how plug-ins are found.

A backend is a class behind an entry point of the group `edgekit.backends`; edgekit never imports one by name.
`lower` and `check` are pure and need no runtime installed; `convert`, `load` and `kernels` do.
`load` is called in a child process only (`edgekit.worker`), because runtimes crash and their threads disturb each other. What `load` does
not need, a backend imports in the methods that do: such a process starts in half the time without ONNX's IR.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import BackendError
from edgekit.target import Target

if TYPE_CHECKING:
    import onnx_ir as ir

Feeds = Mapping[str, NDArray[np.generic]]
Outputs = dict[str, NDArray[np.generic]]

ENTRY_POINT_GROUP = "edgekit.backends"


@dataclass(frozen=True, slots=True)
class Availability:
    """Whether a runtime can be used here.

    Attributes:
        can_convert: its package is installed, so artifacts can be built.
        can_run: its device is present too, so artifacts can be run and timed.
        can_check: artifacts can be run here for their results, on this device or another; not for their speed.
        version: of the runtime, for people ("tensorrt_rtx 1.7.1.116"); empty when not installed.
        reason: why it cannot convert or run; empty when it can do both.
        remedy: what would make it run, as an instruction; empty when nothing is missing.
    """

    can_convert: bool
    can_run: bool
    can_check: bool
    version: str = ""
    reason: str = ""
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Artifact:
    """What a runtime loads.

    Attributes:
        path: the file to load (`.xml`, `.ort`, `.engine`, `.onnx`).
        files: every file that has to be shipped, `path` among them.
        precision: "int8" for the quantized model, else a float precision of `Backend.float_precisions`.
        notes: what its user must know, one sentence each.
        fixed_sizes: it takes the sizes of the calibration samples only, where the model leaves sizes besides the batch open.
    """

    path: Path
    files: tuple[Path, ...]
    precision: str = "int8"
    notes: tuple[str, ...] = ()
    fixed_sizes: bool = False

    @property
    def size_bytes(self) -> int:
        """Bytes of all files together."""
        return sum(file.stat().st_size for file in self.files)


@dataclass(frozen=True, slots=True)
class KernelRecord:
    """One kernel that the runtime really ran.

    Attributes:
        layers: names of the source model's nodes that it covers; empty when the runtime does not say.
        kernel: the runtime's own name for it ("QLinearConv", "brgconv_avx512_core_vnni").
        precision: "int8", "f32", "bf16", "f16", ...: the precision that it computes in.
    """

    layers: tuple[str, ...]
    kernel: str
    precision: str


class CompiledModel(Protocol):
    """An artifact, loaded and ready to run."""

    def run(self, feeds: Feeds) -> Outputs:
        """Run one inference: arrays by input name in, arrays by output name out."""
        ...

    def prepare(self, feeds: Feeds) -> Callable[[], None]:
        """A callable that does one synchronous inference on `feeds` and nothing else: no copy of results, no checks."""
        ...

    def kernels(self, feeds: Feeds) -> Sequence[KernelRecord]:
        """The kernels that run for `feeds`, in order."""
        ...


class Backend(Protocol):
    """A runtime plug-in."""

    name: str

    def available(self, target: Target) -> Availability:
        """Whether artifacts for `target` can be built and run on this machine, and what is missing."""
        ...

    def lower(self, model: ir.Model, target: Target, *, keep_float: frozenset[str]) -> ir.Model:
        """The annotated `model` as the graph that this runtime executes best; nodes in `keep_float` stay float."""
        ...

    def check(self, model: ir.Model, target: Target) -> list[str]:
        """The runtime's documented rules that the lowered `model` breaks, one sentence each; empty when none."""
        ...

    def convert(self, model: Path, target: Target, out: Path, *, precision: str) -> Artifact:
        """Build the artifact for the lowered (or, for a float `precision`, the float) ONNX file into the folder `out`.

        Raises:
            BackendError: with the runtime's own words, when it refuses the file or is not installed.
        """
        ...

    def float_precisions(self, target: Target) -> tuple[str, ...]:
        """The float precisions that this machine's runtime has for `target`, "f32" first."""
        ...

    def load(self, artifact: Artifact, target: Target, *, exact: bool) -> CompiledModel:
        """Load an artifact. `exact` asks for float parts in f32, for parity checks, instead of the runtime's default."""
        ...

    def planned_kernels(self, artifact: Artifact) -> Sequence[KernelRecord]:
        """The kernels that the builder chose, where they are known without running the artifact; else empty."""
        ...


def backend_names() -> list[str]:
    """The names of all installed backends, sorted."""
    return sorted({entry.name for entry in entry_points(group=ENTRY_POINT_GROUP)})


def get_backend(name: str) -> Backend:
    """The backend behind an entry-point name.

    Raises:
        BackendError: when no installed package offers it, or its module does not import.
    """
    found = [entry for entry in entry_points(group=ENTRY_POINT_GROUP) if entry.name == name]
    if not found:
        known = ", ".join(backend_names()) or "none"
        raise BackendError(f"backend {name!r} is not installed (installed: {known}): install its package")
    try:
        backend_class = found[0].load()
    except ImportError as error:
        raise BackendError(f"backend {name!r} does not import: {error}; reinstall {found[0].value!r}") from error
    return cast(Backend, backend_class())
