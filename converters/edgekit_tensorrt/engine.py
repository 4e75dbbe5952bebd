"""Running an engine: one CUDA context, one stream, device buffers that live as long as the shapes do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.backend import Feeds, KernelRecord, Outputs
from edgekit.errors import BackendError, DataError
from edgekit_tensorrt.kernels import from_inspector
from edgekit_tensorrt.package import version_of


def check(result: tuple[Any, ...]) -> Any:
    """The value of a CUDA driver call.

    Raises:
        BackendError: the call failed; with its name.
    """
    status, *values = result
    if int(status) != 0:
        raise BackendError(f"CUDA reports {status.name}; free the GPU's memory or restart the driver and try again")
    return values[0] if len(values) == 1 else tuple(values)


class Engine:
    """An engine file on the first GPU. Call only where `package.missing_gpu()` is empty: else deserialization may crash.

    Raises:
        BackendError: the file is of another GPU or TensorRT version, or a CUDA call fails.
    """

    def __init__(self, path: Path, trt: ModuleType, driver: Any) -> None:
        self._trt, self._driver = trt, driver
        check(driver.cuInit(0))
        device = check(driver.cuDeviceGet(0))
        check(driver.cuCtxSetCurrent(check(driver.cuDevicePrimaryCtxRetain(device))))
        self._stream = check(driver.cuStreamCreate(driver.CUstream_flags.CU_STREAM_NON_BLOCKING))
        self._logger = trt.Logger(trt.Logger.ERROR)
        # The runtime has to outlive the engine.
        self._runtime = trt.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise BackendError(
                f"{path}: {version_of(trt)} cannot load it on this GPU; engines fit one TensorRT version and the GPUs they were "
                "built for: export again with this machine's package and [device] isa"
            )
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise BackendError(
                f"{path}: {version_of(trt)} cannot prepare it, most likely for lack of GPU memory; free some"
            )
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        is_input = {name: self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT for name in names}
        self._inputs = [name for name in names if is_input[name]]
        self._outputs = [name for name in names if not is_input[name]]
        self._buffers: dict[str, tuple[Any, int]] = {}

    def __del__(self) -> None:
        """Give the device's memory back: a process may load several engines, one after the other."""
        for pointer, _ in getattr(self, "_buffers", {}).values():
            self._driver.cuMemFree(pointer)

    def run(self, feeds: Feeds) -> Outputs:
        """Run one inference: arrays by input name in, arrays by output name out."""
        held = self._upload(feeds)
        results = {name: self._empty(name) for name in self._outputs}
        self._execute()
        for name, array in results.items():
            pointer, _ = self._buffers[name]
            if array.nbytes:
                check(self._driver.cuMemcpyDtoHAsync(array.ctypes.data, pointer, array.nbytes, self._stream))
        check(self._driver.cuStreamSynchronize(self._stream))
        del held
        return dict(results)

    def prepare(self, feeds: Feeds) -> Callable[[], None]:
        """One synchronous inference with inputs and outputs already on the device: no copy is in the time."""
        held = self._upload(feeds)
        check(self._driver.cuStreamSynchronize(self._stream))
        del held

        def infer() -> None:
            self._execute()
            check(self._driver.cuStreamSynchronize(self._stream))

        return infer

    def kernels(self, feeds: Feeds) -> Sequence[KernelRecord]:
        """The engine's layers in order, as its inspector tells them for the shapes of `feeds`."""
        self.run(feeds)
        inspector = self._engine.create_engine_inspector()
        inspector.execution_context = self._context
        return from_inspector(inspector.get_engine_information(self._trt.LayerInformationFormat.JSON))

    def _upload(self, feeds: Feeds) -> list[NDArray[np.generic]]:
        """Copy the inputs to the device and set their shapes; the returned host arrays must live until the stream has run."""
        missing = [name for name in self._inputs if name not in feeds]
        if missing:
            raise DataError(f"the engine's inputs {missing} are not fed; it has {self._inputs}, found {sorted(feeds)}")
        held = []
        for name in self._inputs:
            array = np.ascontiguousarray(feeds[name])
            wanted = np.dtype(self._trt.nptype(self._engine.get_tensor_dtype(name)))
            if array.dtype != wanted:
                raise DataError(f"input {name!r} is {array.dtype}, and the engine reads {wanted}; convert it")
            if not self._context.set_input_shape(name, array.shape):
                ranges = self._engine.get_tensor_profile_shape(name, 0)
                raise DataError(
                    f"input {name!r} has shape {array.shape}, and the engine was built for {ranges} (min, opt, max); "
                    "widen [runtime] options in the target and export again"
                )
            pointer = self._reserve(name, array.nbytes)
            if array.nbytes:
                check(self._driver.cuMemcpyHtoDAsync(pointer, array.ctypes.data, array.nbytes, self._stream))
            held.append(array)
        for name in self._outputs:
            self._reserve(name, self._empty(name).nbytes)
        return held

    def _empty(self, name: str) -> NDArray[np.generic]:
        """A host array of the output's present shape."""
        shape = tuple(self._context.get_tensor_shape(name))
        if any(size < 0 for size in shape):
            raise BackendError(
                f"output {name!r} has a shape that depends on the data, {shape}; edgekit runs static ones only"
            )
        return np.empty(shape, dtype=self._trt.nptype(self._engine.get_tensor_dtype(name)))

    def _reserve(self, name: str, size: int) -> Any:
        """The device buffer of a tensor, grown when it is too small, and bound to the context."""
        pointer, capacity = self._buffers.get(name, (None, -1))
        if capacity < size:
            if pointer is not None:
                check(self._driver.cuMemFree(pointer))
            capacity = max(size, 1)
            pointer = check(self._driver.cuMemAlloc(capacity))
            self._buffers[name] = (pointer, capacity)
        if not self._context.set_tensor_address(name, int(pointer)):
            raise BackendError(f"the engine refuses the buffer of tensor {name!r}; export it again")
        return pointer

    def _execute(self) -> None:
        if not self._context.execute_async_v3(int(self._stream)):
            raise BackendError(
                "TensorRT failed to run the engine; run with a smaller batch, or export again on this machine"
            )
