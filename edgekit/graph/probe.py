"""Named values of a graph, in as many runs as it takes to hold few of them at once."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from edgekit.graph.run import Arrays, Session, with_outputs
from edgekit.graph.sizes import WATCHED_BYTES, give_back, in_parts, peak_bytes, value_bytes


class Probe:
    """Sessions that show the values of a graph; several threads may use them at once.

    Most models need one. Where the values of one sample take more than `most_bytes`, they are fetched in parts, each by a run of its
    own, and the sessions give back what they took after each run. Each computes, and holds the weights of, what its part hangs on.

    Args:
        model: the graph.
        names: of its values; inputs are handed through.
        optimize: see `edgekit.graph.run.Session`.
        threads: of one inference; 0 lets ONNX Runtime choose.
        most_bytes: of values that are held at once.
    """

    def __init__(
        self,
        model: ir.Model,
        names: Sequence[str],
        *,
        optimize: bool,
        threads: int = 0,
        most_bytes: int = WATCHED_BYTES,
    ) -> None:
        inputs = {value.name for value in model.graph.inputs}
        self._model, self._optimize, self._threads, self._most_bytes = model, optimize, threads, most_bytes
        self._given = [name for name in names if name in inputs]
        self._computed = [name for name in names if name not in inputs]
        self._sessions: list[tuple[Session, list[str]]] | None = None
        self._lock = threading.Lock()

    def run(self, feeds: Mapping[str, NDArray[np.generic]]) -> Iterator[Arrays]:
        """The values by name, a part at a time; whoever holds no part holds little.

        Raises:
            GraphError: ONNX Runtime cannot load or run the model.
        """
        if self._given:
            yield {name: feeds[name] for name in self._given}
        opened = self._opened(feeds)
        for session, names in opened:
            yield session.lend(feeds, outputs=names)
        if len(opened) > 1:
            give_back()

    def bytes_at_once(self, feeds: Mapping[str, NDArray[np.generic]]) -> int:
        """What a run on arrays like `feeds` holds."""
        if not self._computed:
            return 0
        return max(peak_bytes(self._model, feeds, part) for part in self._parts(feeds))

    def _opened(self, feeds: Mapping[str, NDArray[np.generic]]) -> list[tuple[Session, list[str]]]:
        with self._lock:
            if self._sessions is None:
                parts = self._parts(feeds)
                self._sessions = [(self._open(part, lean=len(parts) > 1), part) for part in parts]
            return self._sessions

    def _open(self, part: list[str], *, lean: bool) -> Session:
        model = with_outputs(self._model, set(part))
        model.graph.outputs[:] = [value for value in model.graph.outputs if value.name in part]
        RemoveUnusedNodesPass()(model)
        return Session(model, optimize=self._optimize, threads=self._threads, lean=lean)

    def _parts(self, feeds: Mapping[str, NDArray[np.generic]]) -> list[list[str]]:
        if len(self._computed) < 2:
            return [self._computed] if self._computed else []
        sizes = value_bytes(self._model, feeds)
        return list(in_parts(self._computed, lambda name: sizes.get(name, 0), self._most_bytes))
