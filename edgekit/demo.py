"""`edgekit demo`: a checkpoint is trained, then goes the way that any user's would."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path

from edgekit.console import progress_bars
from edgekit.errors import BackendError
from edgekit.output import check_folder, write_text
from edgekit.pipelines.targets import list_targets, missing

CHECKPOINT, CALIBRATION, TEST, NETWORK = "digits.pt", "calibration.npz", "test.npz", "digits_net.py"


def run_demo(out: Path, run_step: Callable[[list[str]], None], say: Callable[[str], None]) -> None:
    """Train, compress, export to all targets whose runtime is installed, benchmark; each step is the command that a user would type.

    Raises:
        BackendError: scikit-learn, whose digits it trains on, is not installed.
        OutputError: `out` holds other people's files.
    """
    check_folder(out, marker=NETWORK, what="the demo's folder")
    try:
        from edgekit.training.digits import train
    except ImportError as error:
        raise BackendError(f"the demo needs scikit-learn ({error}); pip install 'edgekit[demo]'") from error

    write_text(out / NETWORK, files("edgekit.training").joinpath(NETWORK).read_text(encoding="utf-8"))
    say("training a small CNN on scikit-learn's handwritten digits ...")
    with progress_bars(quiet=False) as on_progress:
        accuracy = train(out / CHECKPOINT, out / CALIBRATION, out / TEST, on_progress=on_progress)
    say(f"{out / CHECKPOINT}: {100 * accuracy:.2f} % top-1 in float, on digits it was not trained on")

    model = str(out / "compressed")
    run_step(
        [
            "compress", str(out / CHECKPOINT), "--model", f"{out / NETWORK}:digits_net", "--calibration", str(out / CALIBRATION),
            "--evaluate", str(out / TEST), "-o", model,
        ]
    )  # fmt: skip
    run_step(["export", model, *_targets(say)])
    run_step(["benchmark", model, "--batch-size", "8"])


def _targets(say: Callable[[str], None]) -> Iterator[str]:
    for status in list_targets():
        if status.availability.can_convert:
            yield from ("--target", status.target.name)
        else:
            say(f"\n{status.target.name} is left out: {missing(status.availability)}")
