"""`edgekit compress`: a checkpoint or ONNX file becomes one annotated ONNX model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import onnx_ir as ir

import edgekit
from edgekit.data import BoundData, Dataset, Preprocess, open_data
from edgekit.distribution import LayerDistributions
from edgekit.errors import DataError, TargetError
from edgekit.finetune import Finetune
from edgekit.graph.annotations import annotated_values, get_params, set_sample_shape, without_params
from edgekit.graph.contract import check_contract, contract
from edgekit.graph.io import save_annotated
from edgekit.graph.operators import Layer, layers
from edgekit.graph.rules import check_operators
from edgekit.method import EVERYTHING, Method
from edgekit.metric import Evaluate, Runner, open_metric, reference_of
from edgekit.output import check_folder, replaced_files, sha256, write_text
from edgekit.pictures import draw, why_none
from edgekit.pipelines.decision import Decision, bound, decision_notes, metric_decision, open_decision, settle
from edgekit.pipelines.finetune import Tuning
from edgekit.pipelines.floor import Goal, changed_answer, lift_notes, look_at_worst, make_goal, meet
from edgekit.pipelines.floor import explain as measure_layers
from edgekit.pipelines.pruning import check_together
from edgekit.pipelines.quantize import Calibrating, quantize
from edgekit.pipelines.remarks import dequantized, remarks, stays_float
from edgekit.pipelines.search import find_method, forget, make_plan, search_notes
from edgekit.pipelines.sources import (
    EXAMPLES,
    SYNTHETIC,
    canonicalize,
    input_specs,
    load_source,
    rewrite,
    synthetic_samples,
)
from edgekit.pipelines.split import (
    Arrays,
    calibrating_samples,
    deciding,
    first_batch,
    held_back,
    save_arrays,
    save_deciding,
)
from edgekit.progress import Progress, silent
from edgekit.proxy import AUTO, NONE
from edgekit.pruning import Prune
from edgekit.records import (
    COMPRESSED,
    DECIDING,
    HELD_BACK,
    MODEL,
    PRUNED,
    Compressed,
    LayerRecord,
    LayerSensitivity,
    Metric,
    ProxyRecord,
    Source,
    versions,
)
from edgekit.report import write_report
from edgekit.target import PORTABLE, Target, load_target

DEFAULT_SAMPLES = 512
MADE_UP = "calibrated on synthetic data, made from the model alone: check the accuracy on real data before you ship it"

Calibration = str | Path | Mapping[str, Any] | Iterable[Any] | Callable[[], Any]
"""What `edgekit.data.open_data` opens."""


@dataclass(frozen=True, slots=True)
class CompressResult:
    """What `compress` made: the annotated model's path, and what was written down about it."""

    model: Path
    record: Compressed


@dataclass(frozen=True, slots=True)
class _Given:
    """The source and the samples, as `compress` takes them."""

    source: object
    calibration: Calibration
    model: str | Callable[[], object] | None
    samples: int
    preprocess: Preprocess | None
    trust: bool
    input_shape: str | None


@dataclass(frozen=True, slots=True)
class _Loaded:
    """The float graph in canonical form, where it came from, and the samples: to calibrate with, and `held` held back."""

    graph: ir.Model
    origin: Source
    data: BoundData
    calibrating: Calibrating
    verifying: Arrays
    held: int
    remarks: tuple[str, ...]


def compress(
    source: object,
    out: str | Path,
    *,
    calibration: Calibration,
    model: str | Callable[[], object] | None = None,
    samples: int = DEFAULT_SAMPLES,
    target: str = PORTABLE,
    method: Method = EVERYTHING,
    evaluate: str | Path | Callable[[Runner], float] | None = None,
    max_drop: str | float | None = None,
    time_budget: float | None = None,
    search: bool = False,
    seed: int = 0,
    explain: bool = False,
    proxy: str = AUTO,
    finetune: Finetune | None = None,
    prune: Prune | None = None,
    preprocess: Preprocess | None = None,
    trust_checkpoint: bool = False,
    input_shape: str | None = None,
    on_progress: Progress = silent,
) -> CompressResult:
    """Quantize `source` into the folder `out`: after training, or after training it for that.

    Args:
        source: path of a checkpoint (`.pt`, `.pth`, `.th`, `.safetensors`), an exported program (`.pt2`) or an ONNX file, or an
            `nn.Module`.
        out: folder for `model.onnx`, the held-back samples and the record.
        calibration: samples; see `edgekit.data.open_data`. Where there are none, "synthetic" makes some up from the model.
        model: what makes the `nn.Module` that a checkpoint's weights go into.
        samples: how many calibrate; more are held back to verify exports with.
        target: compress for one target, or "portable" for all.
        method: how; the default quantizes weights and activations to 8 bits.
        evaluate: a metric or labelled data; see `edgekit.metric.open_metric`.
        max_drop: how much worse than float the quantized model may be, in points of the metric, or "30dB" or "cos0.999" of its
            outputs; the fewest layers are left in float that it takes.
        time_budget: seconds for searching (ten minutes when None); it ends with the best so far.
        search: try other choices than the method's defaults, and take the best; what `method` was given explicitly stays.
        seed: of the order in which that tries them.
        explain: measure what quantizing each layer alone does, and draw how the worst layers' numbers lie on their grids.
        proxy: the decision that must survive where no metric and no floor is given: one of `edgekit.proxy.PROXIES`, "auto" for the
            first that suits the outputs, or "none". Layers that lose it are left in float.
        finetune: train a torch model first, with quantizers or without. What is trained with quantizers is judged by its training: no
            layer is left in float unless `proxy` or `max_drop` say so.
        prune: cut channels or weights first, and train what is left; see `edgekit.pruning.Prune`.
        preprocess: for images.
        trust_checkpoint: open checkpoints that run pickled code.
        input_shape: of one sample, such as "3x224x224", for synthetic data of a torch model.
        on_progress: told of each step.

    Raises:
        EdgekitError: see `edgekit.errors`; `out` is then as it was.
    """
    out, rules = Path(out), _rules(target)
    check_folder(out, marker=COMPRESSED, what="an edgekit output folder")
    asked = search or explain or max_drop is not None or prune is not None
    proxy = _judge(proxy, evaluate, method, finetune, asked=asked)
    judged = evaluate is None and proxy != NONE
    plan = make_plan(out, search=search, seed=seed, time_budget=time_budget, max_drop=max_drop, judged=judged)
    budget = plan.budget_s if plan else time_budget
    goal = make_goal(str(max_drop), budget, out, has_metric=evaluate is not None) if max_drop is not None else None
    given = _Given(source, calibration, model, samples, preprocess, trust_checkpoint, input_shape)
    check_together(finetune, prune)
    tuning = None
    if finetune or prune:
        tuning = Tuning(finetune, prune, rules, method, samples, evaluate, preprocess, out, on_progress)
    loaded = _load(given, rules, tuning, on_progress, dequantize=method.dequantize)
    graph, calibrating = loaded.graph, loaded.calibrating
    proxy = NONE if proxy == AUTO and _is_trained(loaded) else proxy
    metric = None if evaluate is None else open_metric(evaluate, loaded.data.inputs, preprocess=preprocess)
    decision = _decision(graph, loaded, metric, proxy, asked=goal is not None, dequantize=method.dequantize)
    method, searched = find_method(graph, rules, method, plan, calibrating, metric, on_progress)
    graph = quantize(graph, rules, method, calibrating)
    found, distributions = _looked_at(graph, rules, calibrating, explain, goal, on_progress)
    graph, lifted = meet(graph, rules, goal, found, calibrating, metric, on_progress) if goal else (graph, None)
    graph, lifted, decided = settle(graph, rules, decision, lifted, calibrating, budget, out, on_progress)
    record = Compressed(
        **_about(graph, rules, loaded, method),
        **_measured(decision, decided, tuning),
        evaluate=reference_of(evaluate),
        preprocess=preprocess,
        sensitivity=found,
        distributions=distributions,
        lifted=lifted,
        searched=searched,
        finetuned=tuning.found if tuning else None,
        pruned=tuning.pruned if tuning else None,
    )
    notes = tuple(_notes(record, graph, rules, loaded, asked=goal is not None, explain=explain))
    return _write(out, graph, loaded, decision, record.model_copy(update={"notes": notes}), tuning)


def _load(given: _Given, rules: Target, tuning: Tuning | None, on_progress: Progress, *, dequantize: bool) -> _Loaded:
    calibration, factory, trust = given.calibration, given.model, given.trust
    made_up = isinstance(calibration, str) and calibration == SYNTHETIC
    if made_up:
        calibration = synthetic_samples(given.source, factory=factory, trust=trust, input_shape=given.input_shape)
    dataset = _open(calibration, given.preprocess, given.samples)
    on_progress("load the source", 0, None)
    on_graph = tuning is not None and tuning.plan is None and _is_onnx(given.source)
    tune = None if tuning is None or on_graph else partial(tuning.train, dataset)
    graph, origin = load_source(given.source, dataset, factory=factory, trust=trust, opset=rules.graph.opset, tune=tune)
    promised = contract(graph)
    data = dataset.bind(input_specs(graph))
    on_progress("bring it into canonical form", 0, None)
    examples = first_batch(data, EXAMPLES)
    graph = canonicalize(graph, examples, opset=rules.graph.opset)
    calibrating = Calibrating(data, calibrating_samples(data, given.samples), on_progress)
    if tuning is not None and on_graph:
        graph = tuning.cut_graph(graph, examples, calibrating)
    graph = rewrite(without_params(graph) if dequantize else graph, examples)
    check_contract(promised, graph)
    for value in graph.graph.inputs:
        set_sample_shape(value, examples[value.name or ""].shape)
    verifying, held, remark = held_back(data, calibrating.stop)
    remarks = tuple(filter(None, (remark, MADE_UP if made_up else "")))
    return _Loaded(graph, origin, data, calibrating, verifying, held, remarks)


def _is_onnx(source: object) -> bool:
    return isinstance(source, str | Path) and Path(source).suffix.lower() == ".onnx"


def _is_trained(loaded: _Loaded) -> bool:
    """Whether the model came from torch with quantizers in it: its training is what judges it then."""
    grids = (get_params(value) for value in annotated_values(loaded.graph.graph))
    return loaded.origin.kind != "onnx" and any(params is not None and params.fixed for params in grids)


def _rules(target: str) -> Target:
    rules = load_target(target)
    check_operators(rules)
    return rules


def _judge(proxy: str, evaluate: object, method: Method, finetune: Finetune | None, *, asked: bool) -> str:
    """The decision that stands in for a metric; options that would be ignored are refused, such as what was `asked` of the result."""
    trained = finetune is not None and finetune.qat
    if method.dequantize and (asked or trained or method != Method(dequantize=True)):
        raise TargetError(
            "--dequantize gives the float model and changes nothing: drop what says how to quantize or prune, or how good that must be; "
            "the float model can be compressed like any other"
        )
    if method.has_binary and not trained:
        raise TargetError("binary weights are for training: add --qat, or take int8, int4 or int2 weights")
    if evaluate is not None and proxy not in (AUTO, NONE):
        raise DataError(
            f"--proxy {proxy} and --evaluate are both given; the metric decides where there is one: drop one of them"
        )
    return NONE if method.dequantize or (trained and proxy == AUTO) else proxy


def _decision(
    graph: ir.Model, loaded: _Loaded, metric: Evaluate | None, proxy: str, *, asked: bool, dequantize: bool
) -> Decision | None:
    """What judges the model, if anything is quantized; layers are left in float for it where nobody `asked` for a floor."""
    if dequantize:
        return None
    if metric is not None:
        return metric_decision(graph, metric, loaded.held, lift=proxy != NONE and not asked)
    if proxy == NONE:
        return None
    feeds = deciding(bound(loaded.verifying, graph), loaded.data, loaded.calibrating.stop, graph)
    return open_decision(graph, feeds, proxy)


def _looked_at(
    graph: ir.Model, rules: Target, calibrating: Calibrating, explain: bool, goal: Goal | None, on_progress: Progress
) -> tuple[tuple[LayerSensitivity, ...], tuple[LayerDistributions, ...]]:
    """What each layer costs, where somebody wants to know; and what the worst ones read, for `--explain`."""
    found = measure_layers(graph, rules, calibrating, on_progress) if explain or goal else ()
    return found, look_at_worst(graph, rules, found, calibrating) if explain else ()


def _open(calibration: Calibration, preprocess: Preprocess | None, samples: int) -> Dataset:
    if samples < 1:
        raise DataError(f"samples is {samples}; at least one is needed, a few hundred make good ranges")
    dataset = open_data(calibration, preprocess=preprocess)
    if dataset.size == 0:
        raise DataError(f"{dataset.name}: holds no samples; give at least one, better a few hundred")
    return dataset


def _write(
    out: Path, graph: ir.Model, loaded: _Loaded, judge: Decision | None, record: Compressed, tuning: Tuning | None
) -> CompressResult:
    judging = judge.samples - loaded.held if judge and judge.proxy else 0
    with replaced_files(out, COMPRESSED) as stage:
        save_annotated(graph, stage / MODEL)
        save_arrays(stage / HELD_BACK, loaded.verifying)
        more = save_deciding(stage / DECIDING, loaded.data, loaded.calibrating.stop, judging, loaded.verifying)
        remark = tuning.store(stage / PRUNED) if tuning else ""
        notes = (*record.notes, *([remark] if remark else []))
        record = record.model_copy(update={"model_sha256": sha256(stage / MODEL), "deciding": more, "notes": notes})
        write_text(stage / COMPRESSED, json.dumps(record.model_dump(mode="json"), indent=2) + "\n")
    if record.pruned is None:
        shutil.rmtree(out / PRUNED, ignore_errors=True)  # of another model
    if not more:
        (out / DECIDING).unlink(missing_ok=True)
    forget(out, record.searched)
    draw(out, record)
    write_report(out)
    return CompressResult(out / MODEL, record)


def _layer(layer: Layer) -> LayerRecord:
    return LayerRecord(
        name=layer.name,
        op_type=layer.op_type,
        output_shape=layer.output_shape,
        macs=layer.macs,
        parameters=layer.parameters,
    )


def _about(graph: ir.Model, rules: Target, loaded: _Loaded, method: Method) -> dict[str, Any]:
    """What the record says of the graph, and of how it came to be."""
    return {
        "edgekit": edgekit.__version__,
        "versions": versions("onnx", "onnx-ir", "onnxruntime", "onnxscript", "torch", "numpy"),
        "source": loaded.origin,
        "samples": loaded.calibrating.done,
        "held_back": loaded.held,
        "target": rules.name,
        "method": method,
        "layers": tuple(map(_layer, layers(graph))),
        "stays_float": stays_float(graph, rules),
    }


def _notes(
    record: Compressed, graph: ir.Model, rules: Target, loaded: _Loaded, *, asked: bool, explain: bool
) -> Iterator[str]:
    """What the user should know; whether layers were left in float for a floor that was `asked` for makes a difference."""
    judge = record.proxy or record.simulated_metric
    quantized = any(get_params(value) for value in annotated_values(graph.graph))
    return chain(
        _remarks(graph, rules, loaded, record.method),
        search_notes(record.searched),
        lift_notes(record.lifted, judge.name if judge and not asked else ""),
        decision_notes(record.proxy) if quantized else (),
        # What was cut or trained is held against the model as it came, which is not the one that a floor was sought from.
        changed_answer(record.lifted, None if record.pruned or record.finetuned else record.float_metric),
        loaded.remarks,
        record.finetuned.remarks if record.finetuned else (),
        record.pruned.remarks if record.pruned else (),
        _no_pictures() if explain else (),
    )


def _no_pictures() -> Iterator[str]:
    """Why `--explain` draws nothing, where it does not."""
    if why_none():
        yield why_none()


def _remarks(graph: ir.Model, rules: Target, loaded: _Loaded, method: Method) -> Iterator[str]:
    if method.dequantize:
        return dequantized(loaded.origin.name)
    choices = [method.for_layer(layer.name) for layer in layers(graph)] or [method]
    wanted = any(one.activations != "static" or one.precision != "float" for one in choices)
    return remarks(graph, rules, loaded.origin.name, loaded.calibrating.done, wanted=wanted)


def _measured(decision: Decision | None, decided: ProxyRecord | None, tuning: Tuning | None) -> dict[str, Any]:
    """The metric, in float and with all numbers on their grids, or what stood in for it.

    What was pruned, or trained with its rounding, is held against the model as it came: that is what users have, and without the rounding
    the weights of the other are nobody's model.
    """
    if decision is None or decided is None or decision.float_metric is None:
        return {"proxy": decided}
    before = decision.float_metric
    found = tuning.found if tuning is not None and tuning.plan is not None and tuning.plan.qat else None
    pruned = tuning.pruned if tuning is not None else None
    came = next((one.before for one in (pruned, found) if one is not None and one.before is not None), None)
    if came is not None:
        before = Metric(name=before.name, value=came)
    return {"float_metric": before, "simulated_metric": Metric(name=before.name, value=decided.after)}
