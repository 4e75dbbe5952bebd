"""The exceptions that users see.

::

    EdgekitError                    exit code
    ├── SourceError                 3   a checkpoint or ONNX file cannot be read or does not fit the model
    │   └── UntrustedSourceError    3   it would run pickled code
    ├── DataError                   4   calibration or evaluation data is missing, empty, of a wrong name, shape or type
    ├── TargetError                 5   unknown target; a mistake in a target or recipe file
    ├── GraphError                  6   the model cannot be annotated or lowered as asked
    ├── BackendError                7   a runtime is missing, or refused the artifact
    ├── OutputError                 8   the output folder cannot be written or is not an edgekit output
    └── GoalError                   9   an artifact failed its proof, or a goal that the user set was not met

Only an `EdgekitError` reaches the command line as a message; anything else is a bug and keeps its traceback.
Each message says which thing, what was found, what was expected and what to do.
Click itself exits with 2 on arguments that it cannot parse, and 1 is left to Python's own failures.
"""

from __future__ import annotations


class EdgekitError(Exception):
    """Base of every error that edgekit explains to its user."""

    exit_code = 1


class SourceError(EdgekitError):
    """A checkpoint or ONNX file cannot be read, or does not fit the model."""

    exit_code = 3


class UntrustedSourceError(SourceError):
    """Opening the source would run pickled code."""


class DataError(EdgekitError):
    """Calibration or evaluation data is missing, empty, or of a wrong name, shape or type."""

    exit_code = 4


class TargetError(EdgekitError):
    """An unknown target, or a mistake in a target or recipe file."""

    exit_code = 5


class GraphError(EdgekitError):
    """A model cannot be annotated or lowered as asked."""

    exit_code = 6


class BackendError(EdgekitError):
    """A runtime is missing, or refused the artifact."""

    exit_code = 7


class OutputError(EdgekitError):
    """The output folder cannot be written, or is not an edgekit output."""

    exit_code = 8


class GoalError(EdgekitError):
    """An artifact failed its proof, or a floor or goal that the user set was not met."""

    exit_code = 9
