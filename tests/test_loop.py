"""The training loop: it computes what a plain loop does, goes on where it was killed, and says what went wrong."""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from edgekit.errors import BackendError, DataError, EdgekitError, GoalError, OutputError, SourceError
from edgekit.quant.spec import QuantParams
from edgekit.schedule import Schedule
from edgekit.training import loop
from edgekit.training.batches import Share
from edgekit.training.fake_quant import FakeQuantize
from edgekit.training.loop import Trained, train
from edgekit.training.optimizer import make_optimizer, set_rate
from edgekit.training.resume import Checkpoints
from edgekit.training.taps import Taps
from edgekit.training.teacher import Teacher
from edgekit.training.tracking import log_artifact
from edgekit.training.train_data import open_train_data

TESTS = Path(__file__).parent


class Net(nn.Module):
    """Four numbers to three scores."""

    def __init__(self, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.hidden = nn.Linear(4, 8, bias=False)  # its bias would have no gradient but noise, which AdamW makes large
        self.norm = nn.BatchNorm1d(8)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(8, 3)
        self.register_buffer("seen", torch.zeros(()), persistent=False)
        self.seen: Tensor

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        if self.training:
            self.seen += len(x)
        hidden = torch.relu(self.norm(self.hidden(x)))
        return {"scores": self.head(self.dropout(hidden)), "hidden": hidden}


class _Wider(Net):
    def __init__(self) -> None:
        super().__init__()
        self.more = nn.Linear(1, 1)


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def samples(count: int = 64) -> dict[str, Any]:
    """Three clusters."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, count)
    return {"x": (np.eye(4)[labels] * 2 + rng.normal(0, 0.5, (count, 4))).astype(np.float32), "labels": labels}


def cross_entropy(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
    return F.cross_entropy(student["scores"], batch["labels"])


def quick(**choices: Any) -> Schedule:
    return Schedule.model_validate({"batch_size": 16, "learning_rate": 0.01, "epochs": 2, "track": "none", **choices})


def run(
    folder: Path, module: nn.Module | None = None, data: Any = None, loss: Any = cross_entropy, **options: Any
) -> Trained:
    choices = {name: options.pop(name) for name in list(options) if name in Schedule.model_fields}
    return train(
        module or net(), samples() if data is None else data, loss, schedule=quick(**choices), folder=folder, **options
    )


def weights(module: nn.Module) -> Tensor:
    return torch.cat([value.detach().flatten() for value in module.parameters()])


# ---- what it computes


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_it_computes_what_a_plain_loop_does(tmp_path: Path, optimizer: Any) -> None:
    ours, theirs = net(), net()
    schedule = quick(optimizer=optimizer, warm_up=3)
    done = train(ours, samples(), cross_entropy, schedule=schedule, folder=tmp_path)

    decayed = [theirs.hidden.weight, theirs.head.weight]
    others = [one for one in theirs.parameters() if all(one is not other for other in decayed)]
    groups = [{"params": decayed, "weight_decay": 1e-4}, {"params": others, "weight_decay": 0.0}]
    kinds: dict[str, Callable[[], torch.optim.Optimizer]] = {
        "sgd": lambda: torch.optim.SGD(groups, 0.01, momentum=0.9),
        "adamw": lambda: torch.optim.AdamW(groups, 0.01),
    }
    plain, found, losses = kinds[optimizer](), samples(), []
    for step in range(8):
        epoch, batch = divmod(step, 4)
        for group in plain.param_groups:
            group["lr"] = 0.01 * schedule.rate_factor(step, 8)
        indices = list(Share(16, 0).indices(64, epoch, 0))[batch]
        scores = theirs(torch.from_numpy(found["x"][indices]))["scores"]
        loss = F.cross_entropy(scores, torch.from_numpy(found["labels"][indices]))
        plain.zero_grad()
        torch.autograd.backward(loss)
        plain.step()
        losses.append(loss.item())
    assert done.losses == pytest.approx(losses, rel=1e-5)
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.norm.running_mean, theirs.norm.running_mean, rtol=1e-5, atol=1e-6)


def test_it_learns_and_leaves_things_as_they_should_be(tmp_path: Path) -> None:
    module = net()
    random.seed(5), np.random.seed(5), torch.manual_seed(5)  # noqa: NPY002
    expected = random.random(), np.random.random(), torch.rand(()).item()  # noqa: NPY002
    random.seed(5), np.random.seed(5), torch.manual_seed(5)  # noqa: NPY002
    done = run(tmp_path, module, epochs=10, learning_rate=0.05)
    assert (random.random(), np.random.random(), torch.rand(()).item()) == expected, "the caller's"  # noqa: NPY002
    assert done.steps == len(done.losses) == 40 and done.kept_step == 40 and done.resumed_from == 0
    assert done.losses[-1] < 0.4 * done.losses[0]
    assert not any(child.training for child in module.modules())
    assert "forward" not in vars(module)


def test_the_seed_decides(tmp_path: Path) -> None:
    losses = []
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        torch.manual_seed(0)
        losses.append(run(tmp_path / name, Net(dropout=0.5), seed=seed).losses)
    assert losses[0] == losses[1] != losses[2]


def test_gradients_of_several_batches_are_averaged(tmp_path: Path) -> None:
    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"scores": self.head(x)}

    torch.manual_seed(0)
    large, small = Linear(), Linear()
    small.load_state_dict(large.state_dict())
    wanted = run(tmp_path / "large", large, batch_size=16, optimizer="sgd")
    found = run(tmp_path / "small", small, batch_size=4, accumulate=4, optimizer="sgd")
    assert found.steps == wanted.steps == 8
    assert found.losses == pytest.approx(wanted.losses, rel=1e-5)
    torch.testing.assert_close(weights(small), weights(large), rtol=1e-5, atol=1e-6)


def test_long_gradients_are_shortened(tmp_path: Path) -> None:
    moved = {}
    for clip in (0.0, 0.01):
        module = net()
        before = weights(module)
        run(
            tmp_path / str(clip),
            module,
            steps=1,
            epochs=None,
            optimizer="sgd",
            learning_rate=1.0,
            weight_decay=0,
            clip_norm=clip,
        )
        moved[clip] = (weights(module) - before).norm().item()
    assert moved[0.0] > 0.05
    assert moved[0.01] == pytest.approx(0.01 / 1.0, rel=1e-4)


def test_biases_and_scales_do_not_decay_and_scales_have_their_own_rate() -> None:
    class Quantized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)
            self.layer.scale = nn.Parameter(torch.ones(2, 1))
            self.grid = FakeQuantize(QuantParams("int8", np.float32(0.1), np.int8(0)))
            self.upscale = nn.Parameter(torch.ones(2, 2))
            self.shared = self.layer
            self.fixed = nn.Parameter(torch.ones(1), requires_grad=False)

    module = Quantized()
    optimizer = make_optimizer([module, module.layer], quick(weight_decay=0.3, scale_learning_rate=0.1))
    groups = {
        id(parameter): (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert groups == {
        id(module.layer.weight): (0.01, 0.3),
        id(module.upscale): (0.01, 0.3),
        id(module.layer.bias): (0.01, 0.0),
        id(module.layer.scale): (pytest.approx(0.001), 0.0),
        id(module.grid.gain): (pytest.approx(0.001), 0.0),
    }
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 5
    set_rate(optimizer, 0.5)
    assert sorted(group["lr"] for group in optimizer.param_groups) == pytest.approx([0.0005, 0.005, 0.005])


def test_a_graph_module_is_trained_like_the_module_it_came_from(tmp_path: Path) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = nn.BatchNorm1d(4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"scores": self.head(self.norm(x))}

    torch.manual_seed(0)
    module = Plain()
    traced = torch.fx.symbolic_trace(copy.deepcopy(module))
    assert run(tmp_path / "traced", traced).losses == run(tmp_path / "module", module).losses
    assert torch.equal(traced.norm.running_mean, module.norm.running_mean)


def test_bf16_computes_in_bf16_and_leaves_float32(tmp_path: Path) -> None:
    types = []

    def loss(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        types.append((student["scores"].dtype, teacher["scores"].dtype))
        return cross_entropy(student, teacher, batch)

    module = net()
    inside = []
    module.head.register_forward_hook(lambda head, given, found: inside.append(found.dtype))
    done = run(
        tmp_path, module, loss=loss, mixed_precision="bf16", epochs=8, learning_rate=0.05, teacher=Teacher(net(1))
    )
    assert set(types) == {(torch.float32, torch.float32)} and set(inside) == {torch.bfloat16}
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    assert done.losses[-1] < 0.3 * done.losses[0]
    assert run(tmp_path / "float", epochs=1).losses  # in the same process


@pytest.mark.parametrize("clip_norm", [0.0, 0.5])
def test_scaled_gradients_change_nothing(tmp_path: Path, clip_norm: float, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = run(tmp_path / "plain", clip_norm=clip_norm)
    opened = loop.open_accelerator

    def scaling(schedule: Schedule, folder: Path) -> Any:
        accelerator, remarks = opened(schedule, folder)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
        return accelerator, remarks

    monkeypatch.setattr(loop, "open_accelerator", scaling)  # as on a GPU with fp16
    with pytest.raises(RuntimeError, match="enough"):
        run(tmp_path / "scaled", clip_norm=clip_norm, save_every=5, on_step=[_stop_at(6)])
    found = run(tmp_path / "scaled", clip_norm=clip_norm)
    assert found.resumed_from == 5 and found.losses == pytest.approx(wanted.losses, rel=1e-5)


# ---- teachers, extra modules, callbacks


def test_a_frozen_teacher_is_in_eval_mode_and_stays_as_it_is(tmp_path: Path) -> None:
    class ByName(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net(1)

        def forward(self, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
            return self.net(**inputs)

    teacher = ByName().train()
    before, seen = weights(teacher), []

    def loss(student: Mapping[str, Tensor], outputs: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        seen.append((teacher.training, outputs["scores"].requires_grad))
        return F.mse_loss(student["scores"], outputs["scores"])

    done = run(tmp_path, loss=loss, teacher=teacher, epochs=20, data={"x": samples()["x"]})
    assert set(seen) == {(False, False)} and done.losses[-1] < 0.2 * done.losses[0]
    assert torch.equal(weights(teacher), before) and teacher.net.training and teacher.net.seen == 0
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_a_teacher_may_be_a_function_or_learn_too(tmp_path: Path) -> None:
    def loss(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        return cross_entropy(student, teacher, batch) + F.cross_entropy(teacher["scores"], batch["labels"])

    run(tmp_path / "function", loss=loss, teacher=lambda inputs: {"scores": inputs["x"][:, :3]})
    peer = Teacher(net(1), trained=True)
    before = weights(peer)
    done = run(tmp_path / "peer", loss=loss, teacher=peer, extra=[peer], epochs=8, learning_rate=0.05)
    assert (weights(peer) - before).abs().max() > 0.01 and done.losses[-1] < 0.4 * done.losses[0]
    assert not peer.training


def test_what_the_loss_uses_besides_is_trained_with_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    projector = nn.Linear(8, 4)
    before = weights(projector)

    def loss(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        return F.mse_loss(projector(student["hidden"]), batch["x"])

    done = run(tmp_path, loss=loss, extra=[projector], epochs=10)
    assert not torch.equal(weights(projector), before) and done.losses[-1] < 0.5 * done.losses[0]


def test_a_loss_of_features_finds_them_among_the_outputs(tmp_path: Path) -> None:
    student, taught = net(), Teacher(net(1), ["norm"])
    seen = []

    def loss(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        seen.append((*student, *teacher))
        return F.mse_loss(student["feature:norm"], teacher["feature:norm"])

    done = run(
        tmp_path, student, loss=loss, teacher=taught, taps=Taps(student, ["norm"]), epochs=10, evaluate=lambda _: 0.0
    )
    assert set(seen) == {("scores", "hidden", "feature:norm") * 2} and done.losses[-1] < 0.5 * done.losses[0]


def test_callbacks_see_every_step_before_it_is_taken(tmp_path: Path) -> None:
    module, seen = net(), []

    def freeze(step: int, total: int) -> None:
        seen.append((step, total))
        if step >= 5:
            module.norm.eval()

    run(tmp_path, module, on_step=[freeze], evaluate=lambda _: 0.0)
    assert seen == [(step, 8) for step in range(8)]
    assert module.norm.num_batches_tracked == 5


def test_progress_tells_loss_metric_and_time_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgekit.training.steps.REPORT_EVERY_S", 0.0)
    told: list[tuple[str, int, int | None]] = []
    run(tmp_path, evaluate=lambda _: 0.75, metric_name="top-1", on_progress=lambda *step: told.append(step))
    assert [(done, total) for _, done, total in told] == [(step, 8) for step in range(1, 9)]
    assert told[0][0].startswith("train: loss ") and told[0][0].endswith(" s left")
    assert ", top-1 0.75, " in told[4][0] and told[-1][0].endswith(", top-1 0.75")


# ---- the metric


def scripted(*values: float) -> Callable[[nn.Module], float]:
    left = list(values)
    return lambda module: left.pop(0)


def test_without_a_better_metric_training_ends_and_the_best_weights_are_taken(tmp_path: Path) -> None:
    seen: list[Tensor] = []
    values = scripted(0.5, 0.8, 0.8, 0.7, 0.9)

    def evaluate(module: nn.Module) -> float:
        assert not module.training and not torch.is_grad_enabled()
        seen.append(weights(module))
        return values(module)

    module = net()
    done = run(tmp_path, module, epochs=9, patience=2, evaluate=evaluate)
    assert done.metrics == ((4, 0.5), (8, 0.8), (12, 0.8), (16, 0.7)) and done.steps == 16 and done.kept_step == 8
    assert torch.equal(weights(module), seen[1]) and not torch.equal(seen[1], seen[3])
    columns, rows = done.table("top-1")
    assert columns == ("step", "loss", "top-1") and rows[1] == ("8", f"{sum(done.losses[4:8]) / 4:.4g}", "0.8000")
    again = net(3)
    assert run(tmp_path, again, epochs=9, patience=2, evaluate=scripted()).kept_step == 8  # it had ended
    assert torch.equal(weights(again), seen[1])


def test_without_patience_the_last_weights_stay(tmp_path: Path) -> None:
    done = run(tmp_path, evaluate=scripted(0.9, 0.1))
    assert done.kept_step == done.steps == 8


def test_the_metric_leaves_no_trace(tmp_path: Path) -> None:
    def evaluate(module: nn.Module) -> float:
        module.train()
        module(torch.ones(4, 4))
        return 0.0

    assert run(tmp_path / "a", evaluate=evaluate).losses == run(tmp_path / "b").losses


# ---- going on

KILLED = """
import json, os, signal, sys
from pathlib import Path
import torch
from edgekit.schedule import Augment, Schedule
from edgekit.training.loop import train
from edgekit.training.train_data import open_train_data
from test_loop import Net, cross_entropy, samples
from test_train_data import Noisy, noisy_loader
assert "accelerate" not in sys.modules, "it takes long to import: only training does"
import accelerate, torch._dynamo  # once, before the forks: they take seconds

base = Path(sys.argv[1])
options = dict(track="none", steps=13, save_every=3, patience=9, learning_rate=0.01, batch_size=3)

def data(kind):
    if kind == "images":
        images = torch.rand(14, 4, 5, 5, generator=torch.Generator().manual_seed(0))
        return open_train_data({"x": images.numpy(), "labels": samples(14)["labels"]}, Images(), augment=Augment(flip=True, crop=2))
    kinds = {"dataset": Noisy, "loader": noisy_loader, "generator": lambda: noisy_loader(own_generator=True), "function": lambda: stream}
    return kinds[kind]()

def stream():
    for _ in range(4):
        yield torch.rand(3, 4), torch.randint(3, (3,))

class Images(Net):
    def forward(self, x):
        return super().forward(x.mean((2, 3)) if x.ndim == 4 else x)

def job(kind, folder, out, moment):
    torch.manual_seed(0)
    module = Images(dropout=0.3)
    left = [moment[1]]
    def count(kind_of_moment):
        if moment[0] == kind_of_moment:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
    def hook(event, arguments):
        if event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir") and any(str(folder) in str(one) for one in arguments):
            count("file")
    sys.addaudithook(hook)
    loss = lambda student, teacher, batch: cross_entropy(student, teacher, batch) + 0 * module.seen
    done = train(module, data(kind), loss, schedule=Schedule(**options, accumulate=1 + (kind == "dataset")), folder=folder,
                 evaluate=lambda module: float(module.head.weight.mean()),
                 on_step=[lambda step, total: count("step")])
    states = [value.double().sum().item() for value in (*module.state_dict().values(), module.seen)]
    out.write_text(json.dumps([done.resumed_from, done.losses, done.metrics, done.kept_step, states]))

def forked(*arguments):
    pid = os.fork()
    if pid == 0:
        job(*arguments)
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])

found = {}
for kind in ("images", "dataset", "loader", "generator", "function"):
    moments = [("step", number) for number in (2, 4, 6, 9, 13)]
    if kind == "images":
        moments += [("file", number) for number in (1, 2, 3, 4, 6, 7, 8, 11)]
    for moment in [("none", 0), *moments]:
        folder, out = base / kind / f"{moment[0]}{moment[1]}", base / "out.json"
        out.unlink(missing_ok=True)
        killed = forked(kind, folder, out, moment)
        assert killed == (moment[0] != "none"), moment
        if killed:
            forked(kind, folder, out, ("none", 0))
        found[f"{kind} {moment[0]} {moment[1]}"] = json.loads(out.read_text())
print(json.dumps(found))
"""


def test_killed_at_any_moment_it_goes_on_to_the_same_losses(tmp_path: Path) -> None:
    path = os.pathsep.join([str(TESTS), *sys.path])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILLED, str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    first = {}
    for name, (resumed, *result) in found.items():
        kind, event, number = name.split()
        wanted = found[f"{kind} none 0"][1:]
        assert result == wanted, name
        assert len(result[0]) == 13
        assert not list(tmp_path.glob(f"{kind}/{event}{number}/.*")), "nothing half written is left"
        if event == "step":
            assert resumed == (int(number) - 1) // 3 * 3, name
        first[kind] = result[0]
    assert len({tuple(losses) for losses in first.values()}) >= 4  # they are not all alike
    assert len({found[name][0] for name in found if " file " in name}) >= 3


def test_only_the_newest_two_are_kept_and_an_unreadable_one_is_passed_over(tmp_path: Path) -> None:
    wanted = run(tmp_path / "whole", save_every=2)
    folder = tmp_path / "run"
    with pytest.raises(RuntimeError, match="enough"):
        run(folder, save_every=2, on_step=[_stop_at(7)])
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000004", "step-00000006"]
    state = folder / "step-00000006" / "state.pt"
    state.write_bytes(state.read_bytes()[:-100])
    done = run(folder, save_every=2)
    assert done.resumed_from == 4 and done.losses == wanted.losses
    assert done.remarks == (f"{folder}/step-00000006 could not be read; 4 steps were taken from an older checkpoint",)
    (folder / "step-00000008" / "checkpoint.json").unlink()
    assert run(folder, save_every=2).resumed_from == 6  # and it is written once more
    for path in folder.iterdir():
        (path / "checkpoint.json").write_text("{}")
    with pytest.raises(SourceError, match="none of its 2 checkpoints can be read"):
        run(folder)


def _stop_at(step: int) -> Callable[[int, int], None]:
    def stop(number: int, total: int) -> None:
        if number == step:
            raise RuntimeError("enough")

    return stop


def test_a_finished_run_is_not_repeated(tmp_path: Path) -> None:
    module, again = net(), net(9)
    first = run(tmp_path, module)
    second = run(tmp_path, again, loss=None)
    assert second.losses == first.losses and second.resumed_from == 8
    assert torch.equal(weights(module), weights(again))
    assert torch.equal(again.norm.running_var, module.norm.running_var) and again.seen == module.seen == 128


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"learning_rate": 0.02}, "learning_rate 0.01, now 0.02"),
        ({"epochs": 3}, "epochs 2, now 3"),
        ({"data": samples(80)}, "samples 64, now 80"),
        ({"module": _Wider()}, "tensors"),
        ({"key": "other"}, "key , now other"),
        ({"extra": [nn.Linear(1, 1)]}, "tensors"),
    ],
)
def test_a_folder_of_another_run_is_refused_unless_it_is_to_begin_anew(
    tmp_path: Path, options: dict[str, Any], told: str
) -> None:
    before = run(tmp_path)
    with pytest.raises(OutputError, match=f"step-00000008: is a checkpoint of another training run .*{told}"):
        run(tmp_path, **options)
    assert run(tmp_path, net(5)).losses == before.losses  # it is still there
    assert run(tmp_path, **options, restart=True).resumed_from == 0


def test_where_curves_go_and_how_often_it_is_saved_may_change(tmp_path: Path) -> None:
    wanted = run(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="enough"):
        run(tmp_path / "run", save_every=3, on_step=[_stop_at(7)])
    assert run(tmp_path / "run", save_every=1).losses == wanted.losses


def test_a_checkpoint_runs_no_code(tmp_path: Path) -> None:
    run(tmp_path)

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "pwned"),)

    for path in tmp_path.glob("step-*"):
        torch.save({"modules": Evil()}, path / "state.pt")
    with pytest.raises(SourceError, match="can be read"):
        run(tmp_path)
    assert not (tmp_path / "pwned").exists()


def test_checkpoints_of_many_steps_sort_by_number(tmp_path: Path) -> None:
    for step in (2, 99_999_999, 10):
        (tmp_path / f"step-{step:08d}").mkdir()
    assert "step-99999999" in Checkpoints(tmp_path, {}).kept()


# ---- what goes wrong


def faulty(step: int, fault: float) -> Any:
    """A loss that is `fault` in one call, counted from 1."""
    calls = [0]

    def loss(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        calls[0] += 1
        return cross_entropy(student, teacher, batch) * (fault if calls[0] == step else 1.0)

    return loss


@pytest.mark.parametrize("fault", [math.nan, math.inf])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_loss_that_is_no_number_stops_it_and_keeps_the_last_good_checkpoint(
    tmp_path: Path, fault: float, accumulate: int
) -> None:
    module = net()
    epochs = 2 * accumulate
    with pytest.raises(GoalError) as raised:
        run(tmp_path, module, loss=faulty(7, fault), save_every=2, accumulate=accumulate, epochs=epochs)
    told = ", ".join(map(str, list(Share(16, 0).indices(64, 1, 0))[2][:3]))
    step, newest = {1: (7, 6), 2: (4, 2)}[accumulate]
    assert f"training stopped at step {step} (epoch 2, batch 3, samples {told}, " in str(raised.value)
    assert f"the loss is {fault}; the checkpoint {tmp_path}/step-{newest:08d} is kept; lower learning_rate" in str(
        raised.value
    )
    assert bool(weights(module).isfinite().all())
    wanted = run(tmp_path / "whole", accumulate=accumulate, epochs=epochs)
    assert run(tmp_path, accumulate=accumulate, epochs=epochs).losses == wanted.losses  # with a loss that is mended


def test_a_weight_that_is_no_number_is_not_saved(tmp_path: Path) -> None:
    def loss(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        return student["scores"].mean() + 0 * torch.sqrt(0 * student["scores"]).sum()  # 0, with a gradient of 0 * inf

    with pytest.raises(
        GoalError, match=r"stopped at step 1: 'hidden.weight' is not finite .* no checkpoint had been written yet"
    ):
        run(tmp_path, loss=loss, save_every=1)
    assert not list(tmp_path.iterdir())


def test_labels_out_of_range_say_so(tmp_path: Path) -> None:
    found = {**samples(), "labels": np.full(64, 7)}
    with pytest.raises(
        DataError,
        match=r"step 1 \(epoch 1, batch 1, samples .*labels run from 7 to 7, and the outputs are 'scores' \(16, 3\)",
    ):
        run(tmp_path, data=found)


def _returning(value: Any) -> Any:
    return lambda student, teacher, batch: value(student, teacher, batch)


@pytest.mark.parametrize(
    ("options", "told", "error"),
    [
        ({"loss": _returning(lambda s, t, b: s["scores"])}, r"a tensor of shape \(16, 3\); expected one number", DataError),
        ({"loss": _returning(lambda s, t, b: torch.ones(()))}, r"a tensor of shape \(\) without a gradient", DataError),
        ({"loss": _returning(lambda s, t, b: 1.0)}, "a float; expected one number", DataError),
        ({"loss": _returning(lambda s, t, b: s["score"])}, r"failed at step 1 .*KeyError: 'score' \(.*test_loop.py, line", DataError),
        ({"loss": _returning(lambda s, t, b: t["scores"])}, "KeyError: 'scores'", DataError),
        ({"data": {"y": np.ones((4, 4))}}, "nothing for the input 'x'", DataError),
        ({"data": {"x": np.ones((64, 5), np.float32)}}, "failed at step 1 .*mat1 and mat2 shapes", DataError),
        ({"data": lambda: iter([])}, "does not say how many batches it has, so epochs cannot be counted; give steps", DataError),
        ({"data": lambda: iter([]), "steps": 3, "epochs": None}, "yields no batches", DataError),
        ({"data": TensorDataset(torch.ones(0, 4))}, "holds no samples", DataError),
        ({"accumulate": 5}, "an epoch has 4 batches for each process, fewer than accumulate = 5", DataError),
        ({"patience": 1}, "patience = 1 needs a metric", DataError),
        ({"evaluate": lambda _: math.nan}, "the metric metric is nan after step 4", DataError),
        ({"module": net().requires_grad_(False)}, "Net: no parameter wants a gradient", SourceError),
        ({"mixed_precision": "fp16"}, "'fp16' needs a GPU", BackendError),
    ],
)  # fmt: skip
def test_mistakes_are_explained(tmp_path: Path, options: dict[str, Any], told: str, error: type[EdgekitError]) -> None:
    if torch.cuda.is_available() and "mixed_precision" in options:
        pytest.skip("there is a GPU")
    with pytest.raises(error, match=told):
        run(tmp_path, **options)


def test_fewer_samples_than_a_batch_are_one_batch(tmp_path: Path) -> None:
    assert run(tmp_path, data=samples(5), epochs=3).steps == 3


def test_random_numbers_are_given_back_after_a_mistake(tmp_path: Path) -> None:
    module = net()
    before = torch.get_rng_state()
    with pytest.raises(DataError):
        run(tmp_path, module, loss=lambda *_: 1.0)
    assert torch.equal(torch.get_rng_state(), before) and not module.training


# ---- curves


def test_curves_hyperparameters_and_the_table_go_to_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with pytest.raises(RuntimeError, match="enough"):
        run(
            tmp_path,
            epochs=5,
            save_every=15,
            track="tensorboard",
            evaluate=lambda _: 0.5,
            metric_name="top-1",
            on_step=[_stop_at(17)],
        )
    done = run(tmp_path, epochs=5, save_every=15, track="tensorboard", evaluate=lambda _: 0.5, metric_name="top-1")
    artifact = tmp_path / "model.onnx"
    artifact.write_bytes(b"1234")
    log_artifact(quick(track="tensorboard"), tmp_path, artifact, ("target", "top-1"), [("x86", "0.9")])
    events = EventAccumulator(str(tmp_path / "logs" / "edgekit"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (10, pytest.approx(sum(done.losses[:10]) / 10)),
        (20, pytest.approx(sum(done.losses[10:]) / 10)),
    ]
    assert [event.step for event in events.Scalars("top-1")] == [4, 8, 12, 16, 20]
    told = [event.tensor_proto.string_val[0].decode() for event in events.Tensors("result/text_summary")]
    assert told == ["| step | loss | top-1 |", "| target | top-1 |"] or all("top-1" in text for text in told)
    (about,) = (event.tensor_proto.string_val[0].decode() for event in events.Tensors("artifact/text_summary"))
    assert about.startswith("model.onnx, 4 bytes, SHA-256 03ac674216f3e15c")
    assert any("learning_rate: 0.01" in path.read_text() for path in (tmp_path / "logs").rglob("hparams.yml"))


def test_without_tensorboard_it_says_so_and_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "tensorboard" else find(name, *rest)
    )
    done = run(tmp_path, track="tensorboard")
    assert done.remarks == ("no curves were written: tensorboard is not installed; pip install tensorboard",)
    assert not (tmp_path / "logs").exists()


def test_without_weights_and_biases_asking_for_it_is_a_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate.tracking")  # which looks for trackers when it is imported, and never again
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "wandb" else find(name, *rest))
    with pytest.raises(BackendError, match="the package wandb is not installed; pip install wandb"):
        run(tmp_path, track="wandb")


def test_curves_go_to_weights_and_biases_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert run(tmp_path, track="wandb", evaluate=lambda _: 0.5).steps == 8
    assert list(tmp_path.glob("wandb/offline-run-*")) and (tmp_path / "wandb-run.txt").is_file()


def test_the_artifact_and_its_table_go_to_weights_and_biases_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    model = tmp_path / "model.onnx"
    model.write_bytes(b"weights")
    log_artifact(Schedule(track="wandb"), tmp_path, model, ("layer", "SQNR"), [("conv1", "30.5")])
    [run_file] = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert b"model.onnx" in run_file.read_bytes()
    [written] = tmp_path.glob("wandb/offline-run-*/files/media/table/*.json")
    assert json.loads(written.read_text(encoding="utf-8"))["data"] == [["conv1", "30.5"]]


# ---- several processes

TWO = """
import json, os, sys
from pathlib import Path
import torch
import torch._dynamo
from accelerate import debug_launcher
from test_loop import Net, Projected, quick, samples
from edgekit.training.loop import train

def job(folder, batch_size, out):
    rank = int(os.environ.get("RANK", 0))
    torch.manual_seed(rank)  # the processes begin with other weights
    module = Projected()
    schedule = quick(batch_size=batch_size, save_every=3, optimizer="sgd")
    def stop(step, total):
        if step == 5 and not Path(out).exists():
            raise KeyboardInterrupt
    try:
        done = train(module, samples(), module.loss, schedule=schedule, folder=Path(folder), extra=[module.projector[0]],
                     evaluate=lambda module: 0.5 + rank, on_step=[stop])
    except KeyboardInterrupt:
        return
    if rank == 0:
        Path(out + ".json").write_text(json.dumps([done.resumed_from, done.losses, done.metrics]))

base = sys.argv[1]
debug_launcher(job, (base + "/two", 8, base + "/two-out"), num_processes=2)
Path(base + "/two-out").touch()
debug_launcher(job, (base + "/two", 8, base + "/two-out"), num_processes=2)
Path(base + "/one-out").touch()
job(base + "/one", 16, base + "/one-out")
"""


class Projected(nn.Module):
    """A linear model, and a projector beside it that only the loss calls."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.projector = (nn.Linear(3, 4),)  # in a tuple, where the module does not see it

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"scores": self.head(x)}

    def loss(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        return cross_entropy(student, teacher, batch) + F.mse_loss(self.projector[0](student["scores"]), batch["x"])


def test_two_processes_compute_what_one_does_on_batches_twice_as_large(tmp_path: Path) -> None:
    path = os.pathsep.join([str(TESTS), *sys.path])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", TWO, str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    (resumed, found, metrics), (_, wanted, _) = (
        json.loads((tmp_path / f"{name}-out.json").read_text()) for name in ("two", "one")
    )
    assert resumed == 3 and len(found) == 8
    assert found == pytest.approx(wanted, rel=1e-5)
    assert metrics == [[4, 0.5], [8, 0.5]]  # the first process's


def test_without_accelerate_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None)
    with pytest.raises(BackendError, match=r"training needs the package accelerate; pip install 'edgekit\[train\]'"):
        run(tmp_path)


def test_a_user_s_dataset_needs_no_opening(tmp_path: Path) -> None:
    found = samples()
    dataset = TensorDataset(torch.from_numpy(found["x"]), torch.from_numpy(found["labels"]))
    assert run(tmp_path / "a", data=dataset).losses == run(tmp_path / "b").losses
    assert run(tmp_path / "c", data=open_train_data(found, net())).losses == run(tmp_path / "b").losses
