"""The command line: parses arguments, calls a pipeline, prints what it returns. Nothing else.

Pipelines are imported inside the commands, so that `--help` needs neither torch nor onnx.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgekit import __version__
from edgekit.errors import EdgekitError
from edgekit.options import FINETUNE, METHOD, PRUNE, finetune_options, method_options, prune_options

if TYPE_CHECKING:
    from collections.abc import Collection

    from edgekit.pipelines.compress import CompressResult
    from edgekit.records import Benchmarks

EXIT_CODES = """
\b
Exit codes:
  0  done                         6  the model cannot be annotated or lowered as asked
  2  wrong arguments              7  a runtime is missing, or refused the artifact
  3  the source cannot be used    8  the output folder cannot be used
  4  the data cannot be used      9  a wrong artifact, or a goal not met (--fail-on-slower)
  5  wrong target or recipe       1  a bug in edgekit
"""


class _Command(click.Command):
    """A command whose `EdgekitError`s end in one line on stderr and their own exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except EdgekitError as error:
            click.echo(f"edgekit: {error}", err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("edgekit: interrupted; nothing is left half-written", err=True)
            ctx.exit(130)


@click.group(epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="edgekit")
def main() -> None:
    """Compress a model once; ship it, proven and measured, to TensorRT, OpenVINO and ONNX Runtime."""


def _seconds(ctx: click.Context, parameter: click.Parameter, text: str | None) -> float | None:
    """A time such as 90, 90s, 10m or 1h, in seconds."""
    if text is None:
        return None
    number, unit = text.rstrip("smh"), text[len(text.rstrip("smh")) :]
    try:
        seconds = float(number) * {"": 1, "s": 1, "m": 60, "h": 3600}[unit]
    except (ValueError, KeyError):
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise click.BadParameter(f"{text!r} is no time; give seconds, minutes or hours, such as 90s, 10m or 1h")
    return seconds


_json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON, for machines.")
_folder = click.argument("folder", metavar="OUT", type=click.Path(path_type=Path))


@main.command(cls=_Command)
@click.argument("source", type=click.Path(path_type=Path))
@click.option("-o", "--output", "out", required=True, type=click.Path(path_type=Path), help="Folder for the result.")
@click.option(
    "--model", metavar="FILE.py:FACTORY", help="What makes the nn.Module of a checkpoint; or package.module:factory."
)
@click.option(
    "--calibration",
    metavar="PATH|MODULE:FUNCTION",
    help=".npz, .npy, a folder or zip of images, a function, or synthetic.",
)
@click.option("--input-shape", help="Of one sample, such as 3x224x224, for --calibration synthetic of a checkpoint.")
@click.option("--samples", type=int, help="How many samples calibrate.  [default: 512]")
@click.option("--target", help="Compress for one target instead of all.")
@click.option("--portable", is_flag=True, help="Compress for all targets (the default).")
@click.option("--evaluate", metavar="MODULE:FUNCTION|PATH", help="The metric, or labelled data for top-1.")
@click.option("--max-drop", help="Points of the metric that may be lost, or a floor: 30dB, cos0.999.  [default: none]")
@click.option(
    "--proxy",
    metavar="NAME",
    help="Decision to keep where there is no metric: boxes, text, mask, cosine, threshold, argmax, equal, none.  [default: auto]",
)
@click.option("--search", is_flag=True, default=None, help="Try other choices than the defaults below; take the best.")
@click.option("--seed", type=click.IntRange(0), help="Of the order in which --search tries them.  [default: 0]")
@click.option(
    "--time-budget",
    callback=_seconds,
    metavar="TIME",
    help="For looking for a better model: 90s, 10m.  [default: 10m; 2m if unasked]",
)
@click.option("--explain", is_flag=True, default=None, help="Measure what each layer alone costs; with pictures.")
@method_options
@prune_options
@finetune_options
@click.option("--recipe", type=click.Path(path_type=Path), help="A TOML file with these options and [data.preprocess].")
@click.option("--trust-checkpoint", is_flag=True, default=None, help="Open checkpoints that run pickled code.")
@_json
def compress(
    source: Path,
    out: Path,
    recipe: Path | None,
    target: str | None,
    portable: bool,
    layers: tuple[str, ...],
    keep_float: tuple[str, ...],
    as_json: bool,
    **given: Any,
) -> None:
    """Quantize SOURCE (.pt, .pth, .th, .safetensors, .pt2 or .onnx) for every target, after training or (--qat) while training."""
    from edgekit.console import progress_bars
    from edgekit.pipelines.compress import compress as run
    from edgekit.pipelines.recipe import Recipe, few_bits, load_recipe, merged_finetune, merged_method, merged_prunes
    from edgekit.target import PORTABLE

    if portable and target:
        raise click.UsageError("--portable and --target exclude each other: give one")
    file = load_recipe(recipe) if recipe else Recipe()
    options = file.compress.model_dump(exclude_none=True)
    given = {name: value for name, value in given.items() if value is not None}
    given |= few_bits(given.pop("bits", None), given)
    method = merged_method(file.method, {name: given.pop(name) for name in METHOD & given.keys()}, layers, keep_float)
    finetune = merged_finetune(file.finetune, {name: given.pop(name) for name in FINETUNE & given.keys()})
    pruning = {name: given.pop(name) for name in PRUNE & given.keys()}
    plans = merged_prunes(file.prune, pruning)
    options |= given
    options |= {"target": PORTABLE} if portable else {"target": target} if target else {}
    options.setdefault("target", PORTABLE)
    if "calibration" not in options:
        raise click.UsageError("Missing option '--calibration': samples of what the model sees in use.")
    with progress_bars(quiet=as_json) as on_progress, _stdout_for_json(as_json):

        def one(folder: Path, prune: Any) -> CompressResult:
            return run(
                source,
                folder,
                method=method,
                finetune=finetune,
                prune=prune,
                preprocess=file.data.preprocess,
                on_progress=on_progress,
                **options,
            )

        if len(plans) > 1 and "evaluate" not in options:
            raise click.UsageError(
                "--prune with several ratios compares their accuracy: give the metric with --evaluate"
            )
        if len(plans) > 1:
            _compare(out, plans, one, options["target"], on_progress, as_json=as_json)
            return
        result = one(out, plans[0])
    if as_json:
        _print_json(result.record)
    else:
        _print_compressed(result)


def _compare(
    out: Path,
    plans: list[Any],
    compress_one: Callable[[Path, Any], CompressResult],
    target: str,
    on_progress: Any,
    *,
    as_json: bool,
) -> None:
    """Several ratios of `--prune`."""
    from edgekit.pipelines.pareto import PARETO, pareto
    from edgekit.target import PORTABLE

    found = pareto(out, plans, compress_one, [] if target == PORTABLE else [target], on_progress=on_progress)
    if as_json:
        _print_json(found)
    else:
        click.echo((out / f"{PARETO}.md").read_text(encoding="utf-8"))


@main.command(cls=_Command)
@_folder
@click.option(
    "--target", "targets", multiple=True, required=True, metavar="NAME|FILE.toml", help="May be given several times."
)
@click.option(
    "--format", type=click.Choice(["qdq", "qoperator", "integer"]), help="Of the graph.  [default: the target's]"
)
@click.option("--evaluate", metavar="MODULE:FUNCTION|PATH", help="The metric.  [default: the one of compress]")
@click.option(
    "--tune-placement/--no-tune-placement",
    default=True,
    help="Let measured time choose what runs in int8.  [default: on]",
)
@click.option(
    "--time-budget", callback=_seconds, metavar="TIME", help="For that, each target: 90s, 2m.  [default: none]"
)
@click.option("--allow-wrong", is_flag=True, help="Export, for inspection, even what the runtime computes wrongly.")
@_json
def export(
    folder: Path,
    targets: tuple[str, ...],
    format: Any,
    evaluate: str | None,
    tune_placement: bool,
    time_budget: float | None,
    allow_wrong: bool,
    as_json: bool,
) -> None:
    """Lower the model in OUT for each target, build its artifact, and verify it on its runtime."""
    from edgekit.console import progress_bars
    from edgekit.pipelines.export import export as run

    with progress_bars(quiet=as_json) as on_progress, _stdout_for_json(as_json):
        results = run(
            folder,
            targets,
            format=format,
            evaluate=evaluate,
            allow_wrong=allow_wrong,
            tune_placement=tune_placement,
            time_budget=time_budget,
            on_progress=on_progress,
        )
    if as_json:
        _print_json([result.manifest for result in results])
        return
    for result in results:
        click.echo(f"{result.folder}: {result.manifest.artifact}, {result.manifest.artifact_bytes:,} bytes")
        for note in result.manifest.notes:
            click.echo(f"  note: {note}")
    _print_summary(folder, {result.manifest.target for result in results})


@main.command(cls=_Command)
@_folder
@click.option(
    "--target", "targets", multiple=True, metavar="NAME|FILE.toml", help="May be given several times.  [default: all]"
)
@click.option("--batch-size", type=click.IntRange(1), default=1, show_default=True, help="Samples of one inference.")
@click.option("--iterations", type=click.IntRange(1), help="Inferences of one burst.  [default: by time]")
@click.option("--fail-on-slower", is_flag=True, help="Exit with 9 when an artifact is slower than float32.")
@_json
def benchmark(
    folder: Path, targets: tuple[str, ...], batch_size: int, iterations: int | None, fail_on_slower: bool, as_json: bool
) -> None:
    """Measure the exports in OUT against float on the same runtime."""
    from edgekit.console import progress_bars
    from edgekit.pipelines.benchmark import benchmark as run
    from edgekit.pipelines.benchmark import refuse_slower

    with progress_bars(quiet=as_json) as on_progress, _stdout_for_json(as_json):
        found = run(folder, targets, batch_size=batch_size, iterations=iterations, on_progress=on_progress)
    if as_json:
        _print_json(found)
    else:
        _print_benchmarks(folder, found)
    if fail_on_slower:  # what was measured is printed all the same
        refuse_slower(found)


@main.command(cls=_Command)
@click.argument("path", metavar="OUT|FILE.onnx", type=click.Path(path_type=Path))
@_json
def inspect(path: Path, as_json: bool) -> None:
    """Show the layers of a model, their cost, and which tensors carry which quant attributes."""
    from edgekit.pipelines.inspect import inspect as run

    found = run(path)
    if as_json:
        _print_json(found)
        return
    from edgekit.console import print_inspected

    print_inspected(found)


@main.command(cls=_Command)
@_json
def targets(as_json: bool) -> None:
    """List the targets, and what this machine can do for each."""
    from edgekit.pipelines.targets import list_targets

    with _stdout_for_json(as_json):
        found = list_targets()
    if as_json:
        _print_json(
            [{**status.target.model_dump(mode="json"), "availability": asdict(status.availability)} for status in found]
        )
        return
    from edgekit.console import print_targets

    print_targets(found)


@main.command(cls=_Command)
@click.option(
    "-o", "--output", "out", default="demo-output", show_default=True, type=click.Path(path_type=Path), help="Folder."
)
def demo(out: Path) -> None:
    """Train a small network on handwritten digits, then compress, export and benchmark it."""
    from edgekit.demo import run_demo

    def run_step(arguments: list[str]) -> None:
        click.secho(f"\n$ edgekit {' '.join(arguments)}", bold=True)
        command: Callable[..., Any] = main.main
        code = command(arguments, prog_name="edgekit", standalone_mode=False)
        if code:  # the step has said why
            raise click.exceptions.Exit(code)

    run_demo(out, run_step, click.echo)


@contextmanager
def _stdout_for_json(wanted: bool) -> Iterator[None]:
    """Meanwhile, whatever prints to stdout, be it the user's code or a runtime, prints to stderr."""
    if not wanted:
        yield
        return
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _print_json(found: Any) -> None:
    def plain(value: Any) -> Any:
        if hasattr(value, "model_dump"):
            return value.model_dump(mode="json")
        if is_dataclass(value) and not isinstance(value, type):
            return asdict(value)
        return str(value)

    click.echo(json.dumps(found, indent=2, default=plain))


def _print_compressed(result: CompressResult) -> None:
    from edgekit.report import summary

    record = result.record
    click.echo(f"{result.model}: {record.source.name} for {record.target!r}, {record.how}")
    for done in (record.pruned, record.finetuned):
        if done:
            click.echo(f"  {done.told}")
    if record.float_metric and record.simulated_metric:
        name, before, after = record.float_metric.name, record.float_metric.value, record.simulated_metric.value
        click.echo(f"  {name}: {before:.4f} in float, {after:.4f} in simulation")
    elif record.proxy:
        click.echo(f"  {record.proxy.name} with {record.float_model}: {record.proxy.after:.4g} in simulation")
    for note in record.notes:
        click.echo(f"  note: {note}")
    stale = [row.target for row in summary(result.model.parent)]
    if stale:
        click.echo(
            f"  note: the exports in {result.model.parent} are of the model before: export {', '.join(stale)} again"
        )


def _print_benchmarks(folder: Path, found: Benchmarks) -> None:
    _print_summary(folder, {record.target for record in found.targets})
    for record in found.targets:
        if record.why_not:
            click.echo(f"{record.target}: not timed: {record.why_not}")
        for note in record.notes:
            click.echo(f"{record.target}: {note}")


def _print_summary(folder: Path, targets: Collection[str]) -> None:
    from edgekit.console import print_rows
    from edgekit.report import REPORT_MD, summary

    print_rows([row for row in summary(folder) if row.target in targets])
    click.echo(f"report: {folder / REPORT_MD}")
