"""Training data: what each kind comes to, that any place can be taken up again, and what is refused."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from edgekit.data import InputSpec, Preprocess
from edgekit.errors import DataError
from edgekit.schedule import Augment
from edgekit.training import train_data
from edgekit.training.augment import augmented, draw
from edgekit.training.batches import Share, Tensors, TrainData
from edgekit.training.train_data import Samples, open_train_data

IMAGE = [InputSpec("image", np.dtype(np.float32), (None, 3, 6, 6))]
PAIR = [InputSpec("left", np.dtype(np.float32), (None, 2)), InputSpec("right", np.dtype(np.int64), (None, 2))]


class Net(nn.Module):
    def forward(self, image: Tensor, weight: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        return image


def pictures(count: int = 10, size: int = 6) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten images in two class folders."""
    for index, pixels in enumerate(pictures()):
        path = tmp_path / "images" / ("cat", "dog")[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return tmp_path / "images"


def arrays(count: int = 10) -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(1)
    return {"image": rng.normal(size=(count, 3, 6, 6)).astype(np.float32), "labels": np.arange(count) % 4}


def epoch(data: TrainData, number: int = 0, start: int = 0, share: Share | None = None) -> list[Tensors]:
    return list(data.epoch(number, start, share or Share(3, 7)))


def same(ours: list[Tensors], theirs: list[Tensors]) -> bool:
    return len(ours) == len(theirs) and all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(ours, theirs, strict=True)
    )


# ---- order


def test_an_epoch_shows_each_sample_once_in_an_order_of_its_own() -> None:
    share = Share(3, seed=7)
    orders = [np.concatenate(list(share.indices(12, epoch, 0))) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(12)) for order in orders)
    assert (orders[0] != orders[1]).any()
    assert (orders[0] != np.concatenate(list(Share(3, seed=8).indices(12, 0, 0)))).any()
    assert [len(batch) for batch in share.indices(11, 0, 0)] == [3, 3, 3]  # the rest is less than a batch


def test_two_processes_share_what_one_would_take() -> None:
    alone = list(Share(4, 7).indices(16, 2, 0))
    first, second = (list(Share(2, 7, process, 2).indices(16, 2, 0)) for process in (0, 1))
    for batch, left, right in zip(alone, first, second, strict=True):
        assert batch.tolist() == [*left, *right]


# ---- each kind


def test_images_are_decoded_once_and_normalized_as_for_evaluation(folder: Path) -> None:
    told: list[tuple[str, int, int | None]] = []
    how = Preprocess(mean=(0.5,), std=(0.25,))
    data = open_train_data(folder, IMAGE, preprocess=how, classes=2, on_progress=lambda *step: told.append(step))
    assert data.inputs == ("image",) and data.size == 10
    assert told == [("read training images", 10, 10)]
    batches = epoch(data)
    assert [batch["image"].shape for batch in batches] == [(3, 3, 6, 6)] * 3
    for number, batch in enumerate(batches):
        for place, sample in enumerate(data.samples(0, number, Share(3, 7))):
            index = [0, 2, 4, 6, 8, 1, 3, 5, 7, 9][sample]  # cats come first
            wanted = (pictures()[index].transpose(2, 0, 1) / np.float32(255) - np.float32(0.5)) / np.float32(0.25)
            assert torch.equal(batch["image"][place], torch.from_numpy(wanted))
            assert batch["labels"][place] == index % 2


def test_a_model_of_pixels_gets_bytes(folder: Path) -> None:
    spec = [InputSpec("image", np.dtype(np.uint8), (None, 6, 6, 3))]
    data = open_train_data(folder, spec, preprocess=Preprocess(scale=1.0, layout="NHWC"))
    assert epoch(data)[0]["image"].dtype == torch.uint8


def test_arrays_come_as_they_are(tmp_path: Path) -> None:
    found = arrays()
    np.savez(tmp_path / "data.npz", **found)
    for reference in (tmp_path / "data.npz", str(tmp_path / "data.npz"), found, lambda: found):
        data = open_train_data(reference, IMAGE, classes=4)
        for number, batch in enumerate(epoch(data)):
            chosen = data.samples(0, number, Share(3, 7))
            assert torch.equal(batch["image"], torch.from_numpy(found["image"][chosen]))
            assert batch["labels"].tolist() == found["labels"][chosen].tolist()


def test_a_file_of_one_array_has_no_labels(tmp_path: Path) -> None:
    np.save(tmp_path / "data.npy", arrays()["image"])
    data = open_train_data(tmp_path / "data.npy", IMAGE)
    assert all(batch.keys() == {"image"} for batch in epoch(data))


def test_stored_data_is_a_dataset_of_inputs_and_label(folder: Path) -> None:
    data = open_train_data(folder, IMAGE)
    assert isinstance(data, Samples) and len(data) == 10
    inputs, label = data[5]
    assert inputs["image"].shape == (3, 6, 6) and label == 1
    assert torch.equal(inputs["image"][0], torch.from_numpy(pictures()[1, :, :, 0] / np.float32(255)))
    inputs, label = open_train_data({"image": arrays()["image"]}, IMAGE)[2]  # type: ignore[index]
    assert label is None and torch.equal(inputs["image"], torch.from_numpy(arrays()["image"][2]))


def test_a_module_says_what_its_inputs_are() -> None:
    data = open_train_data(arrays(), Net())
    assert data.inputs == ("image",)
    data = open_train_data({**arrays(), "weight": np.ones((10, 2))}, Net())
    assert data.inputs == ("image", "weight")
    assert epoch(data)[0]["weight"].dtype == torch.float32
    assert open_train_data([{"image": torch.ones(2, 1)}], Net()).inputs == (
        "image",
        "weight",
    )  # labels are for the loss


def pair_of(kind: str) -> Any:
    """The same eight samples of two inputs and a label, in the forms that people's code gives."""
    left, right, labels = torch.arange(16.0).view(8, 2), torch.arange(16).view(8, 2), torch.arange(8) % 3
    whole = {"left": left, "right": right, "labels": labels}
    cut = [slice(0, 4), slice(4, 8)]
    return {
        "dataset": lambda: TensorDataset(left, right, labels),
        "rows": lambda: _Rows(whole),
        "loader": lambda: DataLoader(TensorDataset(left, right, labels), 4),
        "tuples": lambda: [(left[part], right[part], labels[part]) for part in cut],
        "dictionaries": lambda: [{name: value[part].numpy() for name, value in whole.items()} for part in cut],
        "nested": lambda: [((left[part], right[part]), labels[part]) for part in cut],
        "named": lambda: [({"left": left[part], "right": right[part]}, labels[part]) for part in cut],
        "iterator": lambda: iter([(left[part], right[part], labels[part]) for part in cut]),
        "stream": lambda: _Stream(left, right, labels),
    }[kind]()  # fmt: skip


class _Rows:
    """Numbered samples that are no torch dataset."""

    def __init__(self, whole: dict[str, Tensor]) -> None:
        self.whole = whole

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: value[index].numpy() for name, value in self.whole.items()}


class _Stream(IterableDataset[Any]):
    def __init__(self, *tensors: Tensor) -> None:
        self.tensors = tensors

    def __iter__(self) -> Iterator[Any]:
        return iter(zip(*self.tensors, strict=True))


KINDS = ["dataset", "rows", "loader", "tuples", "dictionaries", "nested", "named", "iterator", "stream"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("as_function", [False, True])
def test_what_a_user_s_code_gives_becomes_batches_by_name(kind: str, as_function: bool) -> None:
    if kind == "iterator" and not as_function:
        with pytest.raises(DataError, match="an iterator can be read only once; give a function"):
            open_train_data(pair_of(kind), PAIR)
        return
    data = open_train_data((lambda: pair_of(kind)) if as_function else pair_of(kind), PAIR, classes=3)
    for number in (0, 1):
        batches = epoch(data, number, share=Share(4, 7))
        assert len(batches) == 2
        assert all(batch.keys() == {"left", "right", "labels"} for batch in batches)
        rows = torch.cat([batch["left"] for batch in batches])
        assert sorted(rows[:, 0].tolist()) == [0, 2, 4, 6, 8, 10, 12, 14]
        for batch in batches:
            assert torch.equal(batch["left"], batch["right"].float())
            assert torch.equal(batch["labels"], (batch["right"][:, 0] // 2) % 3)


def test_a_reference_names_the_function(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom torch.utils.data import TensorDataset\n"
        "def training():\n    return TensorDataset(torch.ones(6, 3, 6, 6), torch.zeros(6, dtype=torch.long))\n"
    )
    data = open_train_data(f"{tmp_path}/mine.py:training", IMAGE)
    assert data.size == 6 and epoch(data)[0]["image"].shape == (3, 3, 6, 6)


def test_what_is_no_input_is_kept_for_the_loss() -> None:
    batch = {"image": np.ones((2, 3, 6, 6)), "boxes": np.zeros((2, 4), np.float64)}
    (found,) = epoch(open_train_data([batch], IMAGE))
    assert found["boxes"].dtype == found["image"].dtype == torch.float32


# ---- any place can be taken up again


class Noisy(Dataset[Any]):
    """Draws from every global source of random numbers."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        numbers = [random.random(), np.random.random(), torch.rand(()).item()]  # noqa: NPY002
        return torch.tensor([index, *numbers]), index % 3


def noisy_loader(*, own_generator: bool = False) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(3) if own_generator else None
    return DataLoader(Noisy(), 3, shuffle=True, generator=generator)


@pytest.mark.parametrize("start", [0, 1, 2, 3])
@pytest.mark.parametrize("kind", ["arrays", "augmented", "dataset"])
def test_an_epoch_begun_later_shows_what_it_would_have_shown(kind: str, start: int) -> None:
    made: dict[str, Callable[[], TrainData]] = {
        "arrays": lambda: open_train_data(arrays(12), IMAGE),
        "augmented": lambda: open_train_data(arrays(12), IMAGE, augment=Augment(flip=True, crop=2)),
        "dataset": lambda: open_train_data(TensorDataset(torch.arange(12.0)[:, None]), PAIR[:1]),
    }
    whole = epoch(made[kind](), 5)
    assert len(whole) == 4
    assert same(epoch(made[kind](), 5, start), whole[start:])
    assert not same(epoch(made[kind](), 4), whole)


def test_batches_before_the_place_are_read_at_once_so_that_random_numbers_can_be_set_after_them() -> None:
    read = []

    def batches() -> Iterator[Tensor]:
        for number in range(5):
            read.append(number)
            yield torch.full((2, 2), float(number))

    data = open_train_data(batches, PAIR[:1])
    read.clear()
    rest = data.epoch(0, 3, Share(2, 7))
    assert read == [0, 1, 2]
    assert [int(batch["left"][0, 0]) for batch in rest] == [3, 4]


def test_datasets_and_samplers_are_told_the_epoch() -> None:
    class Told(TensorDataset):
        epochs: list[int] = []  # noqa: RUF012

        def set_epoch(self, number: int) -> None:
            self.epochs.append(number)

    told = Told(torch.ones(4, 2))
    epoch(open_train_data(told, PAIR[:1]), 3)
    epoch(open_train_data(DataLoader(told, 2), PAIR[:1]), 4)
    assert told.epochs == [3, 4]


def test_the_generators_of_a_loader_are_known() -> None:
    assert len(open_train_data(noisy_loader(own_generator=True), PAIR[:1]).generators()) == 1
    assert open_train_data(noisy_loader(), PAIR[:1]).generators() == []


# ---- augmentation


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_images_are_cropped_out_of_zeros_and_mirrored(layout: Any) -> None:
    images = np.random.default_rng(0).normal(size=(5, 2, 4, 6))
    draws = draw(Augment(flip=True, crop=3), 9, seed=1, epoch=2)
    indices = np.asarray([8, 0, 3, 4, 6])
    given = images if layout == "NCHW" else images.transpose(0, 2, 3, 1)
    found = augmented(given, indices, draws, 3, layout)
    found = found if layout == "NCHW" else found.transpose(0, 3, 1, 2)
    for place, index in enumerate(indices):
        for y in range(4):
            for x in range(6):
                column = 5 - x if draws.flipped[index] else x
                row, column = draws.top[index] + y - 3, draws.left[index] + column - 3
                inside = 0 <= row < 4 and 0 <= column < 6
                wanted = images[place, :, row, column] if inside else np.zeros(2)
                assert np.array_equal(found[place, :, y, x], wanted)


def test_every_window_and_both_sides_are_drawn() -> None:
    draws = draw(Augment(flip=True, crop=1), 2000, seed=0, epoch=0)
    for offsets in (draws.top, draws.left):
        assert np.bincount(offsets, minlength=3).min() > 2000 / 3 * 0.9 and offsets.max() == 2
    assert 900 < draws.flipped.sum() < 1100
    assert not draw(Augment(crop=1), 2000, seed=0, epoch=0).flipped.any()


def test_zeros_around_images_are_black(folder: Path) -> None:
    data = open_train_data(folder, IMAGE, preprocess=Preprocess(mean=(0.5,)), augment=Augment(crop=6))
    values = torch.cat([batch["image"] for number in range(4) for batch in epoch(data, number)])
    assert values.min() == -0.5 and (values == -0.5).float().mean() > 0.2


# ---- what is refused


def unlabelled(labels: Any) -> dict[str, NDArray[Any]]:
    return {**arrays(), "labels": np.asarray(labels)}


@pytest.mark.parametrize(
    ("labels", "classes", "told"),
    [
        (np.arange(10), 8, "2 of 10 labels are out of range, the first 8 of sample 8; expected 0 to 7, as the model has 8 classes"),
        (np.arange(10) - 1, None, "1 of 10 labels are out of range, the first -1 of sample 0; expected 0 and up"),
        (np.arange(10.0), None, "labels are float64; expected class numbers"),
        (np.arange(9), None, r"labels have shape \(9,\)"),
    ],
)  # fmt: skip
def test_labels_out_of_range_are_loud(labels: Any, classes: int | None, told: str) -> None:
    with pytest.raises(DataError, match=told):
        open_train_data(unlabelled(labels), IMAGE, classes=classes)


def test_labels_of_a_user_s_batches_are_checked_as_they_come() -> None:
    batches = [(torch.ones(2, 2), torch.tensor([0, 1])), (torch.ones(2, 2), torch.tensor([-100, 9]))]
    data = open_train_data(batches, PAIR[:1], classes=3)
    found = data.epoch(0, 0, Share(2, 7))
    next(found)
    with pytest.raises(
        DataError, match="a batch: 1 of 2 labels are out of range, the first 9 of sample 1; expected 0 to 2"
    ):
        next(found)
    assert len(epoch(open_train_data(batches, PAIR[:1]))) == 2  # what labels mean is the loss's to know


class _Broken(Dataset[Any]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        raise KeyError("image")


@pytest.mark.parametrize(
    ("reference", "told"),
    [
        ("nowhere.npz", "nowhere.npz: does not exist"),
        (3, "is a int; expected a dataset, batches, or a function"),
        (lambda: 3, "is a int; expected a torch.utils.data.Dataset, or an iterable of batches"),
        (lambda: 1 / 0, "the function raised ZeroDivisionError"),
        ([], "holds no batches; give at least one"),
        (TensorDataset(torch.ones(0, 2)), "holds no samples"),
        (DataLoader(TensorDataset(torch.ones(3, 2)), 4, drop_last=True), "holds no batches"),
        ({"left": np.ones((0, 2), np.float32)}, "holds no samples"),
        ({"lift": np.ones((2, 2), np.float32)}, "no array for input 'left' .*; rename 'lift'"),
    ],
)
def test_data_that_is_none_is_refused(reference: Any, told: str) -> None:
    with pytest.raises(DataError, match=told):
        open_train_data(reference, PAIR[:1])


@pytest.mark.parametrize(
    ("batch", "told"),
    [
        ((torch.ones(2, 2),) * 4, r"a batch of 4 parts for a module with 2 inputs \('left', 'right'\); give the inputs in order"),
        ({"lift": torch.ones(2, 2), "right": torch.ones(2, 2)}, "nothing for the input 'left' .*; rename 'lift'"),
        ({"left": "text", "right": torch.ones(2, 2)}, "'left'"),
    ],
)  # fmt: skip
def test_batches_that_do_not_fit_are_refused(batch: Any, told: str) -> None:
    with pytest.raises(DataError, match=told):
        epoch(open_train_data([batch], PAIR))


def test_an_error_of_the_user_s_code_names_it() -> None:
    with pytest.raises(DataError, match=r"the data raised KeyError: 'image' \(.*test_train_data.py, line \d+\)"):
        epoch(open_train_data(_Broken(), PAIR[:1]), share=Share(2, 7))


def test_images_that_do_not_fit_in_memory_want_a_function(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_data, "MOST_BYTES", 10 * 108 - 1)
    with pytest.raises(
        DataError, match=r"10 images of \(3, 6, 6\) take .* of memory, more than .* give module:function"
    ):
        open_train_data(folder, IMAGE)


def test_images_of_other_sizes_are_named(folder: Path) -> None:
    Image.fromarray(pictures(size=7)[0]).save(folder / "dog" / "large.png")
    spec = [InputSpec("image", np.dtype(np.float32), (None, 3, None, None))]
    with pytest.raises(DataError, match=r"'dog/large.png' \(3, 7, 7\)\); set size"):
        open_train_data(folder, spec)


def test_only_images_are_augmented_and_preprocessed() -> None:
    flat = {"left": np.ones((4, 2), np.float32)}
    with pytest.raises(DataError, match="augmentation is for one input of images, with 4 axes"):
        open_train_data(flat, PAIR[:1], augment=Augment(flip=True))
    with pytest.raises(DataError, match="let the function vary its samples"):
        open_train_data(TensorDataset(torch.ones(4, 2)), PAIR[:1], augment=Augment(flip=True))
    with pytest.raises(DataError, match=r"\[data.preprocess\] is for a folder or zip of images only"):
        open_train_data(TensorDataset(torch.ones(4, 2)), PAIR[:1], preprocess=Preprocess())


def test_data_is_checked_as_it_is_read() -> None:
    found = arrays()
    found["image"][4, 0, 0, 0] = np.nan
    with pytest.raises(DataError, match=r"has NaN .* in sample 4"):
        epoch(open_train_data(found, IMAGE), share=Share(10, 7))


def test_processes_take_turns_with_a_user_s_batches() -> None:
    batches = [torch.full((1, 2), float(number)) for number in range(7)]
    data = open_train_data(batches, PAIR[:1])
    for process in (0, 1):
        share = Share(1, 7, process, 2)
        assert data.length(share) == 3
        found = [int(batch["left"][0, 0]) for batch in islice(data.epoch(0, 1, share), 2)]
        assert found == [2 + process, 4 + process]
