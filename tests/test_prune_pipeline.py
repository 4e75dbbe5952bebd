"""Pruning as a step of `compress`: from Python, the command line and a recipe, from the cut to the exported artifact."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import edgekit
from conftest import Cli, TinyFiles
from edgekit.data import open_data
from edgekit.distillation import Distillation
from edgekit.errors import DataError, EdgekitError, GoalError, SourceError, TargetError
from edgekit.finetune import Finetune
from edgekit.graph.annotations import annotated_values, get_params
from edgekit.graph.io import load_annotated, load_onnx
from edgekit.graph.run import Session
from edgekit.graph.sparsity import LayerSparsity, graph_sparsity
from edgekit.method import EVERYTHING, Method
from edgekit.pipelines.finetune import Tuning
from edgekit.pruning import CRITERIA, Prune, Pruned
from edgekit.records import Compressed, Source, read_compressed
from edgekit.schedule import Schedule
from edgekit.target import load_target
from edgekit.training.qat import prepare_qat

FACTORY = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.bn = nn.Conv2d(4, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.second, self.third, self.head = nn.Conv2d(16, 24, 3, padding=1), nn.Conv2d(24, 16, 3, padding=1), nn.Linear(16, 4)

    def forward(self, image):
        x = torch.relu(self.bn(self.first(image)))
        x = torch.relu(self.third(torch.relu(self.second(x))) + x)
        return self.head(x.mean((2, 3)))


def net():
    return Net()
"""
SHORT = Schedule(steps=4, batch_size=16, learning_rate=1e-3, track="none")
QUICK = Method(calibrator="minmax", bias_correction=False, smooth=False, rounding="nearest")
RATIO = Prune(ratio=0.5)
RECOVERY = Finetune(schedule=SHORT)


class Net(nn.Module):
    """A stem, a residual block and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bn = nn.Conv2d(4, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.second, self.third = nn.Conv2d(16, 24, 3, padding=1), nn.Conv2d(24, 16, 3, padding=1)
        self.head = nn.Linear(16, 4)

    def forward(self, image: Tensor) -> Tensor:
        x = F.relu(self.bn(self.first(image)))
        x = F.relu(self.third(F.relu(self.second(x))) + x)
        return self.head(x.mean((2, 3)))


def labelled(count: int, seed: int) -> dict[str, np.ndarray]:
    """Stripes and spots of four kinds in four channels, in noise."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, count)
    y, x = np.mgrid[:6, :6]
    kinds = np.stack([np.sin(x), np.sin(y), np.sin(x + y), np.sin(x) * np.sin(y)])
    image = kinds[labels, None] + rng.normal(0, 1, (count, 4, 6, 6))
    return {"image": image.astype(np.float32), "labels": labels}


IMAGES = {"image": labelled(48, 3)["image"]}


def fresh(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Net().eval()


@pytest.fixture(scope="module")
def learned() -> nn.Module:
    """A network that knows the kinds."""
    net, data = fresh().train(), labelled(512, 0)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(40):
        loss = F.cross_entropy(net(torch.from_numpy(data["image"])), torch.from_numpy(data["labels"]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval()


def compress(source: object, out: Path, **given: Any) -> Compressed:
    """By the shortest way, where a test does not say otherwise."""
    given = {"calibration": IMAGES, "samples": 32, "method": QUICK, "proxy": "none", **given}
    return edgekit.compress(source, out, **given).record


def tuned(out: Path, module: nn.Module, prune: Prune, plan: Finetune | None = RECOVERY, **given: Any) -> Any:
    """What `compress` does before it exports: the module, and what is told of it."""
    evaluate = given.get("evaluate")
    made = Tuning(plan, prune, load_target("portable"), EVERYTHING, 32, evaluate, None, out, lambda *_: None)
    calibration = open_data(given.get("calibration", IMAGES))
    return made.train(calibration, module, Source(name="net", kind="module")), made


def widths(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(one.shape[:2]) for name, one in module.named_parameters() if one.ndim > 1}


def beside(out: Path) -> set[str]:
    """What is in the folder of the output folder, but for what goes on from there."""
    return {path.name for path in out.parent.iterdir() if not path.name.startswith(f".{out.name}.training")}


@pytest.fixture
def exported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the first export, which is only to see whether there can be one; for tests that know."""
    from edgekit.training import export_onnx

    real, calls = export_onnx.export_onnx, list[int]()

    def second(*given: Any, **more: Any) -> Any:
        calls.append(1)
        return real(*given, **more) if len(calls) > 1 else None

    monkeypatch.setattr(export_onnx, "export_onnx", second)


# A whole compression.


@pytest.fixture(scope="module")
def shipped(learned: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pruned by half, recovered on labels, quantized; not to be written to."""
    out = tmp_path_factory.mktemp("pruned") / "out"
    plan = Finetune(data=labelled(96, 1), schedule=SHORT)
    compress(learned, out, prune=RATIO, finetune=plan, evaluate=lambda run: top1(run))
    return out


def top1(run: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> float:
    data = labelled(200, 2)
    [scores] = run({"image": data["image"]}).values()
    return float((scores.argmax(1) == data["labels"]).mean())


def test_the_graph_has_fewer_channels(shipped: Path) -> None:
    record = read_compressed(shipped)
    assert record.pruned is not None
    assert 0 < len(record.pruned.layers) <= 4
    shapes = {name: value.shape for name, value in load_annotated(shipped / "model.onnx").graph.initializers.items()}
    after = {layer.name: layer.after for layer in record.pruned.layers}
    for name, (inputs, outputs) in after.items():
        assert tuple(shapes[f"{name}.weight"].dims[:2]) == (outputs, inputs)
    assert sum(layer.macs for layer in record.layers) == record.pruned.macs[1]
    assert record.pruned.macs[1] < record.pruned.macs[0]


def test_the_record_tells_all_of_it(shipped: Path) -> None:
    raw = json.loads((shipped / "compress.json").read_text())
    record = read_compressed(shipped)
    pruned = record.pruned
    assert pruned is not None
    assert Pruned.model_validate(raw["pruned"]) == pruned
    assert Compressed.model_validate(raw) == record
    assert pruned.summary == "ratio 0.5, by l1, global, one-shot"
    assert pruned.before is not None and pruned.cut is not None and pruned.after is not None
    assert pruned.before > 0.7 and pruned.before > pruned.cut
    assert "labels" in pruned.recovered and "response" in pruned.recovered  # the unpruned model teaches beside them
    assert record.finetuned is None
    assert record.float_metric is not None and record.float_metric.value == pruned.before  # what users have
    assert record.simulated_metric is not None
    assert record.simulated_metric.value == pytest.approx(pruned.after, abs=0.02)
    assert [remark for remark in pruned.remarks if remark not in record.notes] == []


def test_the_report_has_the_tables(shipped: Path) -> None:
    text = (shipped / "report.md").read_text()
    record = read_compressed(shipped)
    assert record.pruned is not None
    assert "- pruned: " + record.pruned.told in text
    table = text.partition("## Pruned\n")[2].partition("\n## ")[0]
    assert "| layer | inputs | outputs | MACs |" in table
    for layer in record.pruned.layers:
        [row] = [line for line in table.splitlines() if line.startswith(f"| `{layer.name}` |")]
        assert f"{layer.macs[0]:,} to {layer.macs[1]:,}" in row
        if layer.before[1] != layer.after[1]:
            assert f"{layer.before[1]} to {layer.after[1]}" in row


def test_nothing_else_is_left(shipped: Path) -> None:
    assert beside(shipped) == {"out"}
    found = {str(path.relative_to(shipped)) for path in shipped.rglob("*") if path.is_file()}
    expected = {"compress.json", "held_back.npz", "model.onnx", "report.json", "report.md"}
    assert found == expected | {f"pruned/{name}" for name in ("program.pt2", "structure.json", "weights.safetensors")}


def test_what_is_stored_does_not_say_how_long_it_took(shipped: Path) -> None:
    structure = (shipped / "pruned" / "structure.json").read_text(encoding="utf-8")
    assert "recovered" in structure
    assert not re.search(r"in \d+ s\b", structure)


def test_the_same_call_gives_the_same_bytes(
    shipped: Path, learned: nn.Module, exported_once: None, tmp_path: Path
) -> None:
    torch.rand(7)
    plan = Finetune(data=labelled(96, 1), schedule=SHORT)
    compress(learned, tmp_path / "out", prune=RATIO, finetune=plan, evaluate=lambda run: top1(run))
    for name in ("model.onnx", "pruned/program.pt2", "pruned/weights.safetensors", "pruned/structure.json"):
        assert (tmp_path / "out" / name).read_bytes() == (shipped / name).read_bytes(), name


def test_the_pruned_module_comes_back(shipped: Path) -> None:
    module = edgekit.load(shipped)
    structure = json.loads((shipped / "pruned" / "structure.json").read_text())
    record = read_compressed(shipped).pruned
    assert record is not None
    assert sum(one.numel() for one in module.parameters()) == record.parameters[1]
    assert Pruned.model_validate(structure["structure"]).layers == record.layers
    data = labelled(200, 2)
    with torch.no_grad():
        scores = module(torch.from_numpy(data["image"])).numpy()
    assert float((scores.argmax(1) == data["labels"]).mean()) == record.after
    assert torch.equal(module(torch.ones(1, 4, 6, 6)), edgekit.load(shipped / "pruned")(torch.ones(1, 4, 6, 6)))


def test_from_the_saved_stage(shipped: Path, tmp_path: Path) -> None:
    """What was stored compresses to the same numbers as what was not."""
    compress(edgekit.load(shipped), tmp_path / "out")
    found, expected = (load_annotated(folder / "model.onnx").graph for folder in (tmp_path / "out", shipped))
    ours, theirs = (
        {name: one.const_value.numpy() for name, one in graph.initializers.items() if one.const_value is not None}
        for graph in (found, expected)
    )
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not np.array_equal(ours[name], theirs[name])] == []
    image = {"image": labelled(16, 9)["image"]}
    [a], [b] = (
        list(Session(folder / "model.onnx", optimize=False).run(image).values())
        for folder in (tmp_path / "out", shipped)
    )
    assert np.array_equal(a, b)


# Prune, then train with quantizers.


@pytest.fixture(scope="module")
def files(learned: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    torch.save(learned.state_dict(), folder / "net.pt")
    (folder / "factory.py").write_text(FACTORY)
    np.savez(folder / "images.npz", image=IMAGES["image"])
    (folder / "recipe.toml").write_text(f"""
[compress]
model = "{folder / "factory.py"}:net"
calibration = "{folder / "images.npz"}"
samples = 32
proxy = "none"

[method]
calibrator = "minmax"
rounding = "nearest"
bias_correction = false
smooth = false

[prune]
ratio = 0.5
criterion = "l2"
ignore = ["second"]

[finetune]
qat = true
[finetune.schedule]
steps = 4
batch_size = 16
track = "none"
""")
    return folder


def test_prune_and_qat_in_one_recipe(files: Path, cli: Cli, exported_once: None, tmp_path: Path) -> None:
    """And from the saved stage the same comes out."""
    done = cli("compress", files / "net.pt", "-o", tmp_path / "out", "--recipe", files / "recipe.toml")
    assert done.code == 0, done.stderr
    record = read_compressed(tmp_path / "out")
    assert record.pruned is not None and record.finetuned is not None
    assert record.pruned.summary == "ratio 0.5, by l2, global, one-shot"
    assert "fine-tuning, 4 steps" in record.pruned.recovered
    assert "quantization-aware" in record.finetuned.summary
    assert {layer.name: layer.after for layer in record.pruned.layers} == {
        "first": (4, 8),
        "second": (8, 24),
        "third": (24, 8),
        "head": (8, 4),
    }
    assert record.pruned.told in done.stdout and record.finetuned.told in done.stdout
    graph = load_annotated(tmp_path / "out" / "model.onnx").graph
    grids = [get_params(value) for value in annotated_values(graph)]
    assert sum(params is not None and params.fixed for params in grids) >= 7
    compared: set[str] = set()
    plan = Finetune(qat=True, schedule=Schedule(steps=4, batch_size=16, track="none"))
    again = Tuning(plan, None, load_target("portable"), QUICK, 32, None, None, tmp_path / "again", lambda *_: None)
    module = again.train(open_data(IMAGES), edgekit.load(tmp_path / "out"), Source(name="net", kind="module"))
    for name, value in module.named_parameters():
        if name in graph.initializers and value.ndim > 1:
            there = graph.initializers[name].const_value
            assert there is not None
            assert np.abs(there.numpy() - value.detach().numpy()).max() < 1e-6, name
            compared.add(name)
    assert len(compared) == 4


def test_the_command_line_overrides_the_recipe(files: Path, cli: Cli, no_export: None, tmp_path: Path) -> None:
    words = ["compress", files / "net.pt", "-o", tmp_path / "out", "--recipe", files / "recipe.toml"]
    for more, said in [
        (["--macs", "0.001"], "0.1% of the multiply-accumulates"),
        (["--prune", "0.3", "--round-to", "64"], "nothing is pruned by a ratio of 0.3"),
        (["--ignore", "secnd"], "'secnd'"),
        (["--ignore", "*"], "ignored"),
        (["--no-recover", "--schedule", "during-training"], "recover"),
    ]:
        done = cli(*words, *more)
        assert done.code in (3, 5, 9), more
        assert said in done.stderr, more
        assert done.stderr.startswith("edgekit: ") and done.stderr.count("\n") == 1
    assert beside(tmp_path / "out") == set()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--prune", "0.5", "--macs", "0.5"], "ratio and macs"),
        (["--prune", "half"], "half"),
        (["--prune", "1.5"], "1.5"),
        (["--prune", ","], "--prune"),
        (["--prune", ""], "--prune"),
        (["--prune", "0.2,x"], "x"),
        (["--macs", "0"], "macs"),
        (["--speedup", "2"], "x86-openvino"),
        (["--criterion", "l1"], "found none of them"),
        (["--sparsity", "3:4"], "3:4"),
        (["--sparsity", "0.5", "--criterion", "l2"], "criterion"),
        (["--prune", "0.5", "--dequantize"], "--dequantize"),
        (["--prune", "0.5", "--no-recover", "--epochs", "3"], "recover"),
    ],
)
def test_wrong_words_are_explained(more: list[str], said: str, files: Path, cli: Cli, tmp_path: Path) -> None:
    words = [
        "compress",
        files / "net.pt",
        "--model",
        f"{files / 'factory.py'}:net",
        "--calibration",
        files / "images.npz",
    ]
    done = cli(*words, "-o", tmp_path / "out", *more)
    assert done.code in (2, 4, 5)
    assert said in done.stderr
    assert done.stderr.count("\n") <= 4  # click's own are usage, help and the error
    assert beside(tmp_path / "out") == set()


def test_help_tells_of_pruning(cli: Cli) -> None:
    text = cli("compress", "--help").stdout
    options = ["--prune", "--macs", "--speedup", "--latency", "--sparsity", "--criterion", "--scope", "--round-to"]
    assert [word for word in (*options, "--schedule", "--recover / --no-recover", "--ignore") if word not in text] == []


# Each criterion, goal and way to recover.


@pytest.mark.parametrize("criterion", CRITERIA)
def test_each_criterion(criterion: str, learned: nn.Module, tmp_path: Path) -> None:
    module, done = tuned(tmp_path / "out", learned, Prune(ratio=0.5, criterion=criterion))
    assert sum(shape[0] for name, shape in widths(module).items() if name in ("first.weight", "second.weight")) <= 20
    assert f"by {criterion}" in done.pruned.summary
    module(torch.zeros(2, 4, 6, 6))


@pytest.mark.parametrize("criterion", ["taylor", "hessian"])
@pytest.mark.parametrize("labels", [True, False])
def test_gradients_are_of_labels_where_there_are_any(labels: bool, criterion: str, tmp_path: Path) -> None:
    """Outputs depend on every other channel alone, which label-free gradients show. The loss on labels, which are all as the network
    says, and surely, depends on none: then the first channels stay."""
    net = fresh()
    with torch.no_grad():
        net.second.bias.copy_(torch.arange(1.0, 25.0))
        net.second.weight[::2] *= 4.0
        net.third.weight[:, ::2] *= 1e-4
        net.head.bias[0] += 200.0
    data = {"image": IMAGES["image"], "labels": np.zeros(48, np.int64)}
    plan = Finetune(data=data if labels else None, schedule=Schedule(steps=1, learning_rate=1e-9, track="none"))
    prune = Prune(ratio=0.5, criterion=criterion, ignore=("first",), round_to=0)
    module, _ = tuned(tmp_path / "out", net, prune, plan)
    kept = np.round(module.second.bias.detach().numpy()).astype(int).tolist()
    assert kept == (list(range(1, 13)) if labels else list(range(2, 25, 2)))


def test_a_function_scores(learned: nn.Module, tmp_path: Path) -> None:
    """Each group's units in an order of its own."""
    seen: dict[str, tuple[int, list[str]]] = {}

    def last(group: Any) -> Tensor:
        seen[group.name] = group.units, sorted({part.layer for part in group.parts if part.role != "follows"})
        return torch.arange(1, group.units + 1)

    plan = Prune(ratio=0.5, criterion=last, scope="layer", round_to=0, recover=False)
    module, done = tuned(tmp_path / "out", learned, plan, None)
    assert seen == {"first": (16, ["first", "head", "second", "third"]), "second": (24, ["second", "third"])}
    assert torch.equal(module.head.weight, learned.head.weight[:, 8:])
    assert torch.equal(module.second.bias, learned.second.bias[12:])
    assert "by last" in done.pruned.summary


@pytest.mark.parametrize(
    ("criterion", "said"),
    [
        (lambda group: torch.ones(3), "shape (3,)"),
        (lambda group: torch.full((group.units,), float("nan")), "not finite"),
        (lambda group: 1 / 0, "ZeroDivisionError"),
        (lambda group: None, "failed"),
        (lambda group: ["a"] * group.units, "failed"),
    ],
)
def test_a_function_that_gives_no_scores(criterion: Any, said: str, learned: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        tuned(tmp_path / "out", learned, Prune(ratio=0.5, criterion=criterion))
    assert said in str(caught.value) and "'first'" in str(caught.value)
    assert beside(tmp_path / "out") == set()


@pytest.mark.parametrize("macs", [0.3, 0.5, 0.8])
def test_a_budget_of_macs_is_kept(macs: float, learned: nn.Module, tmp_path: Path) -> None:
    _, done = tuned(tmp_path / "out", learned, Prune(macs=macs, round_to=0, recover=False), None)
    left = done.pruned.macs[1] / done.pruned.macs[0]
    assert macs - 0.06 < left <= macs
    assert not [remark for remark in done.pruned.remarks if "round" in remark]


def test_a_budget_that_rounding_misses_is_told(learned: nn.Module, tmp_path: Path) -> None:
    _, done = tuned(tmp_path / "out", learned, Prune(macs=0.9, round_to=16, recover=False), None)
    left = done.pruned.macs[1] / done.pruned.macs[0]
    assert left < 0.88
    assert [remark for remark in done.pruned.remarks if f"{left:.1%}" in remark and "90.0%" in remark] != []


def test_without_labels_the_unpruned_model_teaches(learned: nn.Module, tmp_path: Path) -> None:
    """What half of the channels took is won back from its answers, and what is told is what is measured."""
    plan = Finetune(schedule=Schedule(steps=60, batch_size=48, learning_rate=1e-2, track="none"))
    module, done = tuned(tmp_path / "out", learned, RATIO, plan, evaluate=top1)
    pruned = done.pruned
    assert "from response" in pruned.recovered and "labels" not in pruned.recovered
    assert pruned.before - pruned.cut > 0.1
    assert pruned.after - pruned.cut > 0.5 * (pruned.before - pruned.cut)
    data = labelled(200, 2)
    with torch.no_grad():
        right = (module(torch.from_numpy(data["image"])).numpy().argmax(1) == data["labels"]).mean()
    assert pruned.after == pytest.approx(right)


@pytest.mark.parametrize("prune", [RATIO, Prune(ratio=0.5, schedule="iterative:2"), Prune(sparsity=0.5)])
def test_a_recovery_that_was_short_is_told(prune: Prune, learned: nn.Module, tmp_path: Path) -> None:
    """All rounds together; and where else samples may come from, if they are those that calibrate."""
    made = prune.rounds * 4
    _, done = tuned(tmp_path / "own", learned, prune, Finetune(schedule=SHORT))
    [remark] = [remark for remark in done.pruned.remarks if "recovery was" in remark]
    assert f"recovery was {made} steps" in remark and "--epochs" in remark and "--train-data" in remark
    _, done = tuned(tmp_path / "more", learned, prune, Finetune(schedule=SHORT, data=labelled(64, 2)))
    [remark] = [remark for remark in done.pruned.remarks if "recovery was" in remark]
    assert "--epochs" in remark and "--train-data" not in remark
    plan = Finetune(schedule=SHORT.model_copy(update={"steps": 100, "batch_size": 2}))
    _, done = tuned(tmp_path / "long", learned, prune, plan)
    assert not [remark for remark in done.pruned.remarks if "recovery was" in remark]


@pytest.mark.parametrize("labels", [True, False])
def test_from_scratch_learns_from_labels_or_else_the_unpruned_model(
    labels: bool, learned: nn.Module, tmp_path: Path
) -> None:
    data = labelled(256, 1)
    given = data if labels else {"image": data["image"]}
    plan = Finetune(data=given, schedule=Schedule(steps=60, batch_size=64, learning_rate=1e-2, track="none"))
    _, done = tuned(tmp_path / "out", learned, Prune(ratio=0.5, schedule="from-scratch"), plan, evaluate=top1)
    assert ("from labels" in done.pruned.recovered) == labels
    assert done.pruned.cut < 0.5
    assert done.pruned.after > 0.6  # its own random answers would teach nothing


def test_a_teacher_of_the_users_own_teaches(learned: nn.Module, tmp_path: Path) -> None:
    """All of its answers are class 2."""

    class Stubborn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scores = nn.Parameter(torch.tensor([0.0, 0.0, 9.0, 0.0]))

        def forward(self, image: Tensor) -> Tensor:
            return self.scores.expand(image.shape[0], 4)

    plan = Finetune(teacher=Stubborn, schedule=Schedule(steps=60, batch_size=48, learning_rate=1e-2, track="none"))
    module, _ = tuned(tmp_path / "out", learned, RATIO, plan)
    assert bool((module(torch.from_numpy(IMAGES["image"])).argmax(1) == 2).all())


def test_without_recovery_nothing_is_trained(learned: nn.Module, tmp_path: Path) -> None:
    module, done = tuned(
        tmp_path / "out", learned, Prune(ratio=0.5, recover=False, ignore="second"), None, evaluate=top1
    )
    assert done.pruned.recovered == "" and done.pruned.after is None
    assert done.pruned.before > done.pruned.cut
    kept = [row in learned.head.weight.T.tolist() for row in module.head.weight.T.tolist()]
    assert kept and all(kept)
    assert list(tmp_path.iterdir()) == []


def test_training_that_recovery_would_not_do_is_refused(learned: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="recover"):
        compress(learned, tmp_path / "out", prune=Prune(ratio=0.5, recover=False), finetune=RECOVERY)


@pytest.mark.parametrize("recover", [True, False])
def test_the_users_module_stays_as_it_was(recover: bool, tmp_path: Path) -> None:
    net = fresh().train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    for _ in range(2):
        tuned(tmp_path / "out", net, Prune(ratio=0.5, recover=recover), RECOVERY if recover else None)
    assert net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(one.requires_grad and one.grad is None for one in net.parameters())


def test_other_weights_do_not_go_on_from_these_checkpoints(tmp_path: Path) -> None:
    """The same class and the same output folder, another network: what ships is the other one."""
    tuned(tmp_path / "out", fresh(0), RATIO)
    second, done = tuned(tmp_path / "out", fresh(1), RATIO)
    alone, _ = tuned(tmp_path / "alone", fresh(1), RATIO)
    assert "from step" not in done.pruned.recovered
    assert all(torch.equal(value, alone.state_dict()[name]) for name, value in second.state_dict().items())


def test_another_choice_may_be_tried_into_the_same_folder(tmp_path: Path) -> None:
    for plan in (RATIO, Prune(ratio=0.5, criterion="l2"), Prune(ratio=0.5, ignore=("second",)), Prune(macs=0.5), RATIO):
        _, done = tuned(tmp_path / "out", fresh(), plan)
        assert done.pruned.summary == plan.summary
        assert "from step" not in done.pruned.recovered
    _, done = tuned(tmp_path / "out", fresh(), RATIO, Finetune(schedule=SHORT.model_copy(update={"steps": 5})))
    assert ": 5 steps;" in done.pruned.recovered


def test_features_teach_what_was_cut(learned: nn.Module, tmp_path: Path) -> None:
    plan = Finetune(distill=Distillation(kind="feature", pairs="second"), schedule=SHORT)
    _, done = tuned(tmp_path / "out", learned, RATIO, plan)
    assert "second" in done.pruned.recovered


# Sparsity, to the artifact.


def artifact(out: Path) -> dict[str, LayerSparsity]:
    """The zeros of what ONNX Runtime is given."""
    [made] = edgekit.export(out, "x86-onnxruntime", tune_placement=False)
    return {layer.name: layer for layer in graph_sparsity(load_onnx(made.folder / "model.onnx"))}


def test_two_of_four_survive_recovery_and_rounding(learned: nn.Module, exported_once: None, tmp_path: Path) -> None:
    record = compress(learned, tmp_path / "out", prune=Prune(sparsity="2:4"), finetune=RECOVERY, method=EVERYTHING)
    assert record.pruned is not None
    assert record.pruned.sparsity == 0.5
    found = artifact(tmp_path / "out")
    assert len(found) == 4
    assert [name for name, layer in found.items() if not layer.two_four] == []
    module = edgekit.load(tmp_path / "out")
    fours = module.second.weight.detach().movedim(1, -1).reshape(-1, 4)
    assert bool(((fours == 0).sum(1) >= 2).all())
    assert "50.0% of the weights are zero" in (tmp_path / "out" / "report.md").read_text()
    assert [note for note in record.notes if "no CPU runtime" in note] != []


def test_zeros_survive_training_with_quantizers(learned: nn.Module, exported_once: None, tmp_path: Path) -> None:
    plan = Prune(sparsity=0.6, schedule="during-training")
    record = compress(learned, tmp_path / "out", prune=plan, finetune=Finetune(qat=True, schedule=SHORT))
    assert record.pruned is not None and record.finetuned is not None
    assert record.pruned.sparsity == pytest.approx(0.6, abs=0.001)
    found = artifact(tmp_path / "out")
    zeros = sum(layer.zeros * layer.weights for layer in found.values()) / sum(
        layer.weights for layer in found.values()
    )
    assert zeros >= 0.599  # rounding adds some


@pytest.mark.parametrize("schedule", ["one-shot", "during-training"])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_shares_of_zeros(schedule: str, scope: str, learned: nn.Module, tmp_path: Path) -> None:
    plan = Prune.model_validate({"sparsity": 0.5, "schedule": schedule, "scope": scope, "ignore": "head"})
    module, done = tuned(tmp_path / "out", learned, plan)
    zeros = {name: float((one == 0).float().mean()) for name, one in module.named_parameters() if one.ndim > 1}
    assert zeros["head.weight"] == 0.0
    assert [share == pytest.approx(0.5, abs=0.001) for name, share in zeros.items() if name != "head.weight"] == [
        scope == "layer"
    ] * 3 or scope == "global"
    total = sum(int((module.get_parameter(name) == 0).sum()) for name in zeros)
    weights = sum(module.get_parameter(name).numel() for name in zeros if name != "head.weight")
    assert total == pytest.approx(0.5 * weights, abs=2)
    assert 0.48 < done.pruned.sparsity < 0.5  # of all layers, the one that was ignored too


# What cannot be pruned.


@pytest.fixture
def no_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails before the graph needs none."""
    monkeypatch.setattr("edgekit.training.export_onnx.export_onnx", lambda *_, **__: None)


def loaded(learned: nn.Module, folder: Path) -> nn.Module:
    from edgekit.training.stored import save_module

    save_module(learned, folder, (IMAGES["image"][:2],), structure={})
    return edgekit.load(folder)


def quantized(learned: nn.Module) -> nn.Module:
    return prepare_qat(learned, (IMAGES["image"],), load_target("portable"), method=EVERYTHING)


@pytest.mark.parametrize(
    ("prune", "kind", "said"),
    [
        (Prune(macs=0.001), GoalError, ("0.1%", "the least that pruning these layers can leave")),
        (Prune(ratio=0.01), GoalError, ("ratio of 0.01", "rounded", "the least that can go is")),
        (Prune(ratio=0.5, round_to=64), GoalError, ("rounded", "no channel can go")),
        (Prune(ratio=0.5, ignore=("secnd",)), SourceError, ("'secnd'", "did you mean 'second'")),
        (Prune(sparsity=0.5, ignore=("secnd",)), SourceError, ("'secnd'", "did you mean 'second'")),
        (Prune(ratio=0.5, ignore=("*",)), SourceError, ("Net has no channels that can be cut", "ignored")),
        (Prune(sparsity=0.5, ignore=("*",)), SourceError, ("Net has no layer that can be sparse",)),
        (Prune(ratio=0.5, schedule="during-training"), DataError, ("at least; found 1",)),
    ],
)
def test_goals_that_cannot_be_met(
    prune: Prune, kind: type[EdgekitError], said: tuple[str, ...], no_export: None, tmp_path: Path
) -> None:
    steps = 1 if prune.schedule == "during-training" else 4
    plan = Finetune(schedule=SHORT.model_copy(update={"steps": steps}))
    with pytest.raises(kind) as caught:
        compress(fresh(), tmp_path / "out", prune=prune, finetune=plan)
    assert [text for text in said if text not in str(caught.value)] == []
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("share", [0.99, 0.9999])
def test_no_layer_is_emptied(share: float, learned: nn.Module, tmp_path: Path) -> None:
    """What a layer keeps at least is kept, and told."""
    for scope, least in (("global", 2), ("layer", 1)):
        plan = Prune.model_validate({"ratio": share, "round_to": 0, "scope": scope, "recover": False})
        module, done = tuned(tmp_path / "out", learned, plan, None)
        assert all(min(shape) >= least for shape in widths(module).values())
        text = " ".join(done.pruned.remarks)
        assert "stay of a layer" in text and "instead of" in text


def test_a_graph_is_no_source_for_cutting(learned: nn.Module, no_export: None, tmp_path: Path) -> None:
    """Neither a program, nor what was loaded, nor what has quantizers; single weights are another matter."""
    module = loaded(learned, tmp_path / "stored")
    for source in (tmp_path / "stored" / "program.pt2", module, quantized(learned)):
        with pytest.raises(SourceError, match=r"graph.*--model.*--sparsity") as caught:
            compress(source, tmp_path / "out", prune=RATIO)
        assert "\n" not in str(caught.value)
        assert beside(tmp_path / "out") == {"stored"}


def test_a_program_can_be_made_sparse(learned: nn.Module, exported_once: None, tmp_path: Path) -> None:
    loaded(learned, tmp_path / "stored")
    record = compress(
        tmp_path / "stored" / "program.pt2",
        tmp_path / "out",
        prune=Prune(sparsity=0.5),
        finetune=RECOVERY,
    )
    assert record.pruned is not None and record.pruned.sparsity == pytest.approx(0.5, abs=0.001)
    assert len(graph_sparsity(load_annotated(tmp_path / "out" / "model.onnx"))) == 4


def test_what_cannot_be_followed_is_named(no_export: None, tmp_path: Path) -> None:
    """The operator that mixes the channels, and the layer whose they are."""

    class Mixing(Net):
        def forward(self, image: Tensor) -> Tensor:
            x = torch.fft.fft(F.relu(self.bn(self.first(image))), dim=1).real
            return self.head(x.mean((2, 3)))

    with pytest.raises(SourceError) as caught:
        compress(Mixing().eval(), tmp_path / "out", prune=RATIO)
    assert "first" in str(caught.value) and "fft" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_exported_is_told_before_training(tmp_path: Path) -> None:
    class Branching(Net):
        def forward(self, image: Tensor) -> Tensor:
            return super().forward(image if image.sum() > 0 else -image)

    with pytest.raises(SourceError, match="branches on the values in a tensor"):
        compress(Branching().eval(), tmp_path / "out", prune=RATIO, finetune=RECOVERY)
    assert list(tmp_path.iterdir()) == []


def test_nothing_to_cut(no_export: None, tmp_path: Path) -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(144, 4)

        def forward(self, image: Tensor) -> Tensor:
            return self.head(image.flatten(1))

    with pytest.raises(SourceError, match="Head has no channels that can be cut"):
        compress(Head(), tmp_path / "out", prune=RATIO)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("plan", [RATIO, Prune(sparsity=0.5)])
def test_weights_that_are_not_finite(plan: Prune, no_export: None, tmp_path: Path) -> None:
    net = fresh()
    with torch.no_grad():
        net.get_parameter("first.weight")[0, 0, 0, 0] = float("nan")
    with pytest.raises(EdgekitError, match=r"first.*not finite"):
        compress(net, tmp_path / "out", prune=plan)
    assert list(tmp_path.iterdir()) == []


def test_dequantizing_prunes_nothing(learned: nn.Module, tmp_path: Path) -> None:
    for plan in (None, RECOVERY):
        with pytest.raises(TargetError, match=r"--dequantize.*prune"):
            compress(learned, tmp_path / "out", method=Method(dequantize=True), prune=RATIO, finetune=plan)
    assert list(tmp_path.iterdir()) == []


def test_an_onnx_file_is_cut_but_not_trained(tiny: TinyFiles, tmp_path: Path) -> None:
    for plan, finetune in [
        (RATIO, RECOVERY),
        (Prune(sparsity=0.5), None),
        (Prune(ratio=0.5, schedule="iterative:2"), None),
        (Prune(ratio=0.5, criterion="taylor"), None),
    ]:
        with pytest.raises(EdgekitError) as caught:
            compress(tiny.model, tmp_path / "out", calibration=str(tiny.data), prune=plan, finetune=finetune)
        assert "checkpoint" in str(caught.value) or "torch" in str(caught.value)
        assert list(tmp_path.iterdir()) == []
    record = compress(tiny.model, tmp_path / "out", calibration=str(tiny.data), prune=Prune(ratio=0.5, ignore="stem"))
    assert record.pruned is not None
    assert {layer.name for layer in record.pruned.layers} == {"deep", "head"}
    assert [note for note in record.notes if "not trained after pruning" in note] != []
    assert not (tmp_path / "out" / "pruned").exists()
    with pytest.raises(SourceError, match=r"structure\.json"):
        edgekit.load(tmp_path / "out")


def test_an_earlier_result_survives_a_failure(
    shipped: Path, snapshot: Callable[[Path], dict[str, str]], no_export: None, tmp_path: Path
) -> None:
    import shutil

    out = Path(shutil.copytree(shipped, tmp_path / "out"))
    before = snapshot(out)
    bad = fresh()
    with torch.no_grad():
        bad.get_parameter("bn.bias")[3] = float("nan")  # the criterion does not see it, the graph would
    for source, plan in [
        (fresh(), Prune(macs=0.001)),
        (fresh(), Prune(ratio=0.5, ignore="none")),
        (bad, Prune(ratio=0.5, recover=False)),
    ]:
        with pytest.raises((EdgekitError, AttributeError)):
            compress(source, out, prune=plan)
        assert snapshot(out) == before
        assert beside(out) == {"out"}


def test_a_failure_after_pruning_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[int] = []

    def fails_later(*_: Any, **__: Any) -> None:
        calls.append(1)
        if len(calls) > 1:
            raise SourceError("not any more")

    monkeypatch.setattr("edgekit.training.export_onnx.export_onnx", fails_later)
    with pytest.raises(SourceError, match="not any more"):
        compress(fresh(), tmp_path / "out", prune=Prune(ratio=0.5, recover=False))
    assert list(tmp_path.iterdir()) == []


def test_another_model_takes_the_pruned_one_away(shipped: Path, tiny: TinyFiles, tmp_path: Path) -> None:
    """`edgekit.load` must not give the module of the model before."""
    import shutil

    out = Path(shutil.copytree(shipped, tmp_path / "out"))
    compress(tiny.model, out, calibration=str(tiny.data))
    assert read_compressed(out).pruned is None
    assert not (out / "pruned").exists()


def test_what_cannot_be_stored_is_shipped_all_the_same(
    monkeypatch: pytest.MonkeyPatch, exported_once: None, tmp_path: Path
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise SourceError("no program can be made of it")

    monkeypatch.setattr("edgekit.training.stored.save_module", refuse)
    record = compress(fresh(), tmp_path / "out", prune=Prune(ratio=0.5, recover=False))
    assert [note for note in record.notes if "not kept beside the model: no program can be made of it" in note] != []
    assert not (tmp_path / "out" / "pruned").exists()
    assert record == read_compressed(tmp_path / "out")
    assert hashlib.sha256((tmp_path / "out" / "model.onnx").read_bytes()).hexdigest() == record.model_sha256
