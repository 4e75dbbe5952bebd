"""The options of `edgekit compress` that are fields of a record: of `edgekit.Method`, and of `edgekit.finetune.Finetune`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

METHOD = {
    "calibrator": click.option(
        "--calibrator", help="What chooses ranges: auto, eq, minmax, mse, kld, ...  [default: auto]"
    ),
    "activations": click.option("--activations", help="Static, dynamic, or none (only weights).  [default: static]"),
    "precision": click.option(
        "--precision", help="Of static activations: int2, int4, int8, int16 or float.  [default: int8]"
    ),
    "weights": click.option(
        "--weights", help="Type of weights: int8, int4, uint4, int2, uint2, or binary with --qat.  [default: int8]"
    ),
    "block_size": click.option(
        "--block-size", type=int, help="Weights that share a scale; 0: a channel's.  [default: 0]"
    ),
    "rounding": click.option(
        "--rounding", help="What chooses codes of weights: nearest, gptq, adaround.  [default: auto]"
    ),
    "rounding_budget": click.option("--rounding-budget", type=float, help="Seconds for adaround.  [default: 600]"),
    "bias_correction": click.option(
        "--bias-correction/--no-bias-correction", default=None, help="Keep means of outputs.  [default: on]"
    ),
    "smooth": click.option(
        "--smooth/--no-smooth", default=None, help="SmoothQuant before matrix products.  [default: on]"
    ),
    "equalize": click.option(
        "--equalize/--no-equalize", default=None, help="Cross-layer equalization.  [default: off]"
    ),
    "dequantize": click.option(
        "--dequantize", is_flag=True, default=None, help="Give the float model of a SOURCE that is quantized, no more."
    ),
}
"""The options of `edgekit.Method`, by its field names."""


FINETUNE = {
    "qat": click.option("--qat", is_flag=True, default=None, help="Quantization-aware training before the export."),
    "data": click.option(
        "--train-data",
        "data",
        metavar="PATH|MODULE:FUNCTION",
        help="What to train on.  [default: --calibration, without labels]",
    ),
    "teacher": click.option(
        "--teacher", metavar="FILE.py:FACTORY", help="Makes the teacher.  [default: the model itself, in float]"
    ),
    "scales": click.option("--scales", help="Of the quantizers: learned or tracked.  [default: learned]"),
    "freeze": click.option("--freeze", type=float, help="Share of the steps after which they stop.  [default: 0.8]"),
    "distill__kind": click.option(
        "--distill",
        "distill__kind",
        metavar="KIND,...",
        help="What is learned: response, feature, attention, rkd, similarity.",
    ),
    "distill__scheme": click.option(
        "--distill-scheme", "distill__scheme", help="Offline, online or self.  [default: offline]"
    ),
    "distill__temperature": click.option(
        "--temperature", "distill__temperature", type=float, help="Of response.  [default: 4]"
    ),
    "distill__hard": click.option(
        "--hard", "distill__hard", type=float, help="Share of the loss on labels.  [default: 0.5]"
    ),
    "schedule__epochs": click.option(
        "--epochs", "schedule__epochs", type=int, help="Passes over the data.  [default: 3]"
    ),
    "schedule__steps": click.option("--steps", "schedule__steps", type=int, help="Updates, in the place of --epochs."),
    "schedule__learning_rate": click.option(
        "--lr", "schedule__learning_rate", type=float, help="The highest.  [default: 1e-4]"
    ),
    "schedule__optimizer": click.option(
        "--optimizer", "schedule__optimizer", help="Either adamw or sgd.  [default: adamw]"
    ),
    "schedule__batch_size": click.option(
        "--batch-size", "schedule__batch_size", type=int, help="Samples of one step.  [default: 64]"
    ),
    "schedule__track": click.option(
        "--track", "schedule__track", help="Curves for tensorboard, wandb or none.  [default: tensorboard]"
    ),
    "augment__flip": click.option(
        "--flip", "augment__flip", is_flag=True, default=None, help="Mirror half of the images."
    ),
    "augment__crop": click.option("--crop", "augment__crop", type=int, help="Shift images by up to so many pixels."),
}
"""The options of `edgekit.finetune.Finetune`, by its field names; those of its tables behind two underscores."""

PRUNE = {
    "ratio": click.option(
        "--prune", "ratio", metavar="RATIO,...", help="Prune: share of the channels that go; several are compared."
    ),
    "macs": click.option("--macs", type=float, help="Prune: share of the multiply-accumulates that stay."),
    "speedup": click.option("--speedup", metavar="TIMES@TARGET", help="Prune: until it is so much faster, in float."),
    "latency": click.option("--latency", metavar="TIME@TARGET", help="Prune: until it takes so long, in float."),
    "blocks": click.option("--blocks", type=int, help="Prune: leave out so many whole blocks of a stack."),
    "sparsity": click.option(
        "--sparsity", metavar="SHARE|2:4", help="Prune: single weights become zero, the smallest."
    ),
    "criterion": click.option(
        "--criterion", help="Prune: what goes first: l1, l2, bn, taylor, hessian, random, fpgm.  [default: l1]"
    ),
    "scope": click.option(
        "--scope", help="Prune: compare channels of all layers (global), or of each.  [default: global]"
    ),
    "round_to": click.option("--round-to", help="Prune: to multiples of so many channels, or auto.  [default: auto]"),
    "schedule": click.option(
        "--schedule", help="Prune: one-shot, iterative:N, during-training or from-scratch.  [default: one-shot]"
    ),
    "recover": click.option(
        "--recover/--no-recover",
        default=None,
        help="Prune: train what is left, as the options for training say; an ONNX file is fitted layer by layer.  [default: on]",
    ),
    "ignore": click.option("--ignore", metavar="LAYER,...", help="Prune: layers that keep their channels; patterns."),
}
"""The options of `edgekit.pruning.Prune`, by its field names."""


def prune_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options of `PRUNE`."""
    for option in reversed(PRUNE.values()):
        command = option(command)
    return command


def finetune_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options of `FINETUNE`, and `--bits`."""
    bits = click.option("--bits", type=click.Choice(["8", "4", "2"]), help="Of weights and activations.  [default: 8]")
    for option in reversed([*FINETUNE.values(), bits]):
        command = option(command)
    return command


def method_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options of `METHOD`, and exceptions for layers."""
    layers = click.option(
        "--layer", "layers", multiple=True, metavar="PATTERN:KEY=VALUE,...", help="Other choices for some layers."
    )
    keep = click.option("--keep-float", multiple=True, metavar="PATTERN", help="Layers to leave in float.")
    for option in reversed([*METHOD.values(), layers, keep]):
        command = option(command)
    return command
