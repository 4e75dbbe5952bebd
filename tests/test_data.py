from __future__ import annotations

import io
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.data import Batch, InputSpec, Preprocess, example_arrays, open_data
from edgekit.errors import DataError, SourceError, TargetError
from edgekit.reference import resolve_reference
from edgekit.toml_file import Table, validate

REPOSITORY = Path(__file__).parent.parent
ZOO_ZIP = REPOSITORY.parent / "shared" / "zoo" / "cifar10-jpeg-test.zip"
DIGITS = REPOSITORY / "calibration_data" / "digits.npz"


def spec(name: str, dtype: str, *shape: int | None) -> InputSpec:
    return InputSpec(name, np.dtype(dtype), shape)


def numbered(count: int, *shape: int) -> np.ndarray[Any, Any]:
    """float32 samples, each filled with its number."""
    return np.broadcast_to(np.arange(count, dtype=np.float32).reshape(-1, *[1] * len(shape)), (count, *shape)).copy()


def joined(batches: list[Batch], name: str) -> np.ndarray[Any, Any]:
    return np.concatenate([batch.feeds[name] for batch in batches])


X = spec("x", "float32", None, 3)


# Arrays


@pytest.mark.parametrize("kind", ["npz", "npy", "mapping", "array"])
def test_every_sample_comes_once_in_an_order_that_the_seed_decides(tmp_path: Path, kind: str) -> None:
    x = numbered(100, 3)
    np.savez(tmp_path / "d.npz", x=x)
    np.save(tmp_path / "d.npy", x)
    reference: Any = {"npz": tmp_path / "d.npz", "npy": str(tmp_path / "d.npy"), "mapping": {"x": x}, "array": x}[kind]

    def order(seed: int) -> list[float]:
        bound = open_data(reference, seed=seed).bind([X])
        assert bound.size == 100
        batches = list(bound.batches(32))
        assert [len(batch) for batch in batches] == [32, 32, 32, 4]
        assert all(batch.labels is None and batch.feeds["x"].shape == (len(batch), 3) for batch in batches)
        return joined(batches, "x")[:, 0].tolist()

    assert order(0) == order(0) != order(1)
    assert sorted(order(0)) == list(range(100)) != order(0)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 45), st.integers(0, 45), st.data())
def test_arrays_and_a_function_that_yields_them_in_pieces_give_the_same_window(
    count: int, batch_size: int, start: int, stop: int, draw: st.DataObject
) -> None:
    x = numbered(count, 3)
    pieces = draw.draw(st.lists(st.integers(0, 9), max_size=9).map(lambda sizes: np.cumsum(sizes)))
    arrays = list(open_data({"x": x, "labels": np.arange(count)}).bind([X]).batches(batch_size, start, stop))
    order = joined(list(open_data(x).bind([X]).batches(count)), "x")

    def function() -> Iterator[Any]:
        for part in np.split(order, pieces):
            yield part, part[:, 0].astype(np.int64)

    streamed = list(open_data(function).bind([X]).batches(batch_size, start, stop))
    assert [len(batch) for batch in streamed] == [len(batch) for batch in arrays]
    assert sum(map(len, arrays)) == max(0, min(stop, count) - start)
    for one, other in zip(streamed, arrays, strict=True):
        np.testing.assert_array_equal(one.feeds["x"], other.feeds["x"])
        np.testing.assert_array_equal(one.labels, other.labels)
        np.testing.assert_array_equal(one.labels, one.feeds["x"][:, 0])


@pytest.mark.parametrize("stream", [False, True])
def test_a_static_batch_axis_gets_exactly_that_many(stream: bool) -> None:
    fixed = spec("x", "float32", 4, 3)
    reference: Any = (lambda: [numbered(7, 3), numbered(3, 3)]) if stream else numbered(10, 3)
    assert [len(batch) for batch in open_data(reference).bind([fixed]).batches(1)] == [4, 4]
    few: Any = (lambda: [numbered(3, 3)]) if stream else numbered(3, 3)
    with pytest.raises(DataError, match=r"exactly 4|than the 4"):
        list(open_data(few).bind([fixed]).batches(1))


VOICE = [spec("sound", "float32", None, 8), spec("state", "float32", 2, None, 4), spec("rate", "int64")]


def test_inputs_without_a_batch_axis_take_a_row_a_call() -> None:
    data = {"sound": numbered(6, 8), "state": numbered(6, 2, 1, 4), "rate": np.arange(6), "labels": np.arange(6)}
    batches = list(open_data(data).bind(VOICE).batches(32))
    assert [len(batch) for batch in batches] == [1] * 6
    for batch in batches:
        shapes = {name: array.shape for name, array in batch.feeds.items()}
        assert shapes == {"sound": (1, 8), "state": (2, 1, 4), "rate": ()}
        number = int(batch.feeds["rate"])
        assert batch.labels is not None and batch.labels.tolist() == [number]
        assert (batch.feeds["sound"] == number).all() and (batch.feeds["state"] == number).all()


def test_an_item_is_one_call_as_it_stands_when_inputs_have_no_common_batch_axis() -> None:
    def calls() -> Iterator[dict[str, Any]]:
        for number in range(3):
            yield {"sound": np.ones((1, 8)), "state": np.ones((2, 1, 4), np.float32), "rate": number}

    batches = list(open_data(calls).bind(VOICE).batches(32))
    assert [int(batch.feeds["rate"]) for batch in batches] == [0, 1, 2]
    assert batches[0].feeds["state"].shape == (2, 1, 4) and batches[0].feeds["sound"].dtype == np.float32
    assert [int(batch.feeds["rate"]) for batch in open_data(calls).bind(VOICE).batches(8, 1, 2)] == [1]


def test_rows_of_whole_batches_may_have_labels_of_their_own() -> None:
    bound = open_data({"x": numbered(5, 4, 3), "labels": np.arange(20).reshape(5, 4)}).bind(
        [spec("x", "float32", 4, 3)]
    )
    for batch in bound.batches(8):
        assert batch.feeds["x"].shape == (4, 3) and batch.labels is not None
        assert batch.labels.tolist() == (4 * batch.feeds["x"][0, 0] + np.arange(4)).tolist()


@pytest.mark.parametrize(
    ("stored", "wanted"),
    [("float64", "float32"), ("float16", "float32"), ("float32", "float16"), (">f4", "float32"), ("int64", "int32"),
     ("uint8", "int64"), ("bool", "int64"), ("int64", "bool"), ("uint64", "int8")],
)  # fmt: skip
def test_lossless_casts_are_silent(stored: str, wanted: str) -> None:
    x = np.asarray([[0, 1, 1]] * 4, stored)
    batch = next(open_data(x).bind([spec("x", wanted, None, 3)]).batches(4))
    assert batch.feeds["x"].dtype == np.dtype(wanted) and batch.feeds["x"].dtype.isnative
    np.testing.assert_array_equal(batch.feeds["x"], [[0, 1, 1]] * 4)


def with_bad(value: float, at: int) -> np.ndarray[Any, Any]:
    x = numbered(10, 3)
    x[at, 1] = value
    return x


@pytest.mark.parametrize(
    ("data", "inputs", "message"),
    [
        ({"y": numbered(4, 3)}, [X], r"no array for input 'x' \(arrays found: 'y'\); name the arrays like the inputs"),
        ({"image_": numbered(4, 3)}, [spec("image", "float32", None, 3)], r"rename 'image_'"),
        (numbered(4, 3), [X, spec("y", "float32", None, 3)], r"1 unnamed array for a model with 2 inputs \('x', 'y'\)"),
        (numbered(4), [X], r"array of shape \(4,\); expected 2 axes, the first one counting samples, or 3"),
        (numbered(4, 5), [X], r"'x' \(float32, N x 3\) got an array of shape \(4, 5\); expected N x 3"),
        (numbered(4, 8, 8, 3), [spec("x", "float32", None, 3, 8, 8)], r"channels seem to be last: transpose"),
        (numbered(4, 3, 8, 8), [spec("x", "float32", None, 8, 8, 3)], r"channels seem to be first: transpose"),
        ({"x": numbered(4, 3), "y": numbered(5, 3)}, [X, spec("y", "float32", None, 3)], r"\('x' 4, 'y' 5\)"),
        (numbered(0, 3), [X], r"holds no samples"),
        (with_bad(np.nan, 7), [X], r"NaN or a number beyond float32's range in sample 7;"),
        (with_bad(-np.inf, 3), [X], r"in sample 3;"),
        (with_bad(1e6, 2), [spec("x", "float16", None, 3)], r"beyond float16's range in sample 2;"),
        (np.zeros((4, 3), np.uint8), [X], r"array of type uint8; save .* as float32: pixels\? .*astype"),
        (numbered(4, 3), [spec("x", "int64", None, 3)], r"array of type float32; save whole numbers, as int64"),
        (np.full((4, 3), 300), [spec("x", "uint8", None, 3)], r"from 300 to 300, which uint8 cannot hold; .* 0 to 255"),
        (np.zeros((4, 3), np.complex64), [X], r"complex64; save it as float32"),
        ({"x": np.asarray(5.0)}, [spec("x", "float32")], r"no batch axis .* one row for each call: an array of calls"),
        ({"x": numbered(4, 3), "labels": np.zeros(3, np.int64)}, [X], r"labels have shape \(3,\); expected \(4,\)"),
        ({"x": numbered(4, 3), "labels": np.zeros((4, 10), np.int64)}, [X], r"labels have shape \(4, 10\)"),
        ({"x": numbered(4, 3), "labels": np.zeros(4)}, [X], r"labels are float64; expected class numbers"),
    ],
)
def test_what_is_wrong_with_arrays_is_said(data: Any, inputs: list[InputSpec], message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(open_data(data).bind(inputs).batches(4))


def test_a_model_whose_input_is_called_labels_gets_it() -> None:
    inputs = [X, spec("labels", "int64", None)]
    data = {"x": numbered(4, 3), "labels": np.arange(4)}
    for reference in (data, lambda: [data]):
        batch = next(open_data(reference).bind(inputs).batches(4))
        assert batch.labels is None
        np.testing.assert_array_equal(batch.feeds["labels"], batch.feeds["x"][:, 0])


def test_unreadable_array_files_are_explained(tmp_path: Path) -> None:
    whole = io.BytesIO()
    np.savez(whole, x=numbered(100, 3))
    (tmp_path / "cut.npz").write_bytes(whole.getvalue()[:-200])
    (tmp_path / "text.npy").write_text("not an array")
    np.savez(tmp_path / "object.npz", x=np.asarray([{"a": 1}], object))
    (tmp_path / "data.csv").write_text("1,2,3")
    (tmp_path / "empty.npz").write_bytes(b"")
    np.save(tmp_path / "bare.npy", numbered(100, 3))
    (tmp_path / "bare.npy").rename(tmp_path / "bare.npz")
    (tmp_path / "archive.npy").write_bytes(whole.getvalue())
    np.save(tmp_path / "short.npy", numbered(100, 3))
    (tmp_path / "short.npy").write_bytes((tmp_path / "short.npy").read_bytes()[:-200])
    for name in ("cut.npz", "text.npy", "object.npz", "empty.npz", "bare.npz", "archive.npy", "short.npy"):
        with pytest.raises(DataError, match=rf"{name}: cannot be read .* numpy.savez"):
            open_data(tmp_path / name)
    with zipfile.ZipFile(tmp_path / "vast.npz", "w") as archive, archive.open("x.npy", "w") as member:
        np.lib.format.write_array_header_1_0(member, {"descr": "<f4", "fortran_order": False, "shape": (10**14, 3)})
    with pytest.raises(DataError, match=r"vast.npz: does not fit in memory"):
        open_data(tmp_path / "vast.npz")
    np.save(tmp_path / "nobody.npy", numbered(0, 3))
    with pytest.raises(DataError, match=r"nobody.npy: holds no samples"):
        open_data(tmp_path / "nobody.npy").bind([X])
    with pytest.raises(DataError, match=r"data.csv: unknown kind of data; expected an .npz or .npy file, a folder"):
        open_data(tmp_path / "data.csv")
    with pytest.raises(DataError, match=r"nothing.npz: does not exist"):
        open_data(tmp_path / "nothing.npz")
    with pytest.raises(DataError, match=r"\[data.preprocess\] is for images only"):
        open_data(DIGITS, preprocess=Preprocess())


# Functions


def test_a_torch_data_loader_is_read_with_labels_and_as_often_as_wanted() -> None:
    x = torch.arange(30.0).reshape(10, 3)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, torch.arange(10)), batch_size=4)
    data = open_data(loader)
    assert data.labelled and data.size is None
    bound = data.bind([X])
    for _ in range(2):
        batches = list(bound.batches(3))
        assert [len(batch) for batch in batches] == [3, 3, 3, 1]
        np.testing.assert_array_equal(joined(batches, "x"), x.numpy())
        np.testing.assert_array_equal(np.concatenate([batch.labels for batch in batches]), np.arange(10))


@pytest.mark.parametrize(
    ("item", "labels"),
    [
        ((np.ones((4, 3)), np.arange(4)), True),
        (((np.ones((4, 3)),), np.arange(4)), True),
        (({"x": np.ones((4, 3))}, np.arange(4)), True),
        ({"x": np.ones((4, 3)), "labels": np.arange(4)}, True),
        ([torch.ones(4, 3, requires_grad=True), torch.arange(4)], True),
        ({"x": [[1.0, 1.0, 1.0]] * 4, "unused": np.zeros(9)}, False),
        ((np.ones((4, 3)),), False),
    ],
)
def test_ways_to_yield_one_input(item: Any, labels: bool) -> None:
    data = open_data(lambda: [item])
    assert data.labelled == labels
    batch = next(data.bind([X]).batches(8))
    np.testing.assert_array_equal(batch.feeds["x"], np.ones((4, 3), np.float32))
    assert (batch.labels is not None and batch.labels.tolist() == [0, 1, 2, 3]) == labels


def test_a_pair_that_cannot_be_labels_is_two_inputs() -> None:
    inputs = [spec("ids", "int64", None, None), spec("mask", "int64", None, None)]
    pair = (np.ones((2, 5), np.int64), np.zeros((2, 5), np.int64))
    batch = next(open_data(lambda: [pair]).bind(inputs).batches(8))
    assert batch.labels is None and batch.feeds["mask"].sum() == 0 and batch.feeds["ids"].sum() == 10


def test_samples_of_other_lengths_begin_a_new_batch() -> None:
    lengths = [5, 5, 7, 7, 7, 5]
    bound = open_data(lambda: [np.ones((1, n), np.int64) for n in lengths]).bind([spec("ids", "int64", None, None)])
    assert [batch.feeds["ids"].shape for batch in bound.batches(2)] == [(2, 5), (2, 7), (1, 7), (1, 5)]


def raising() -> Iterator[Any]:
    yield numbered(4, 3)
    raise KeyError("image")


USED_UP = iter([numbered(4, 3), numbered(4, 3)])


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (list, r"yields nothing"),
        (raising, r"the function raised KeyError: 'image' \(test_data.py, line \d+\)"),
        (lambda: 5, r"gives a int; expected an iterable"),
        (lambda: USED_UP, r"returns the same iterator again"),
        (lambda: ["text"], r"a str is no array of numbers"),
        (
            lambda: [np.array(["a", "bc"])],
            r"holds text \(numpy <U2\); models are given numbers and truth values here: let the part",
        ),
        (lambda: [numbered(0, 3)], r"yields no samples"),
        (lambda: [numbered(4, 3), numbered(4, 2, 3)], r"begins with sample 4 is unlike the first one"),
        (lambda: [(numbered(4, 3), np.arange(4)), numbered(4, 3)], r"begins with sample 4 is unlike the first one"),
        (lambda: [numbered(4, 3), with_bad(np.inf, 5)], r"in sample 9;"),
        (lambda: [(numbered(4, 3), numbered(4, 3))], r"2 unnamed arrays for a model with 1 inputs"),
        (lambda path: [path], r"is called without arguments, but takes \(path\)"),
        (iter([1]), r"an iterator can be read only once"),
        (5, r"is a int; expected arrays by name, or a function"),
    ],
)
def test_what_is_wrong_with_a_function_is_said(function: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(open_data(function).bind([X]).batches(4))


# Images


def picture(height: int, width: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def save(path: Path, pixels: np.ndarray[Any, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(pixels).save(path)


def zipped(folder: Path, root: str = "") -> Path:
    out = folder.with_suffix(".zip")
    with zipfile.ZipFile(out, "w") as archive:
        for file in folder.rglob("*"):
            archive.write(file, root + file.relative_to(folder).as_posix())
    return out


IMAGE = spec("image", "float32", None, 3, 6, 8)


@pytest.mark.parametrize("form", ["folder", "zip", "zip with a root folder"])
def test_class_folders_are_labels(tmp_path: Path, form: str) -> None:
    folder = tmp_path / "set"
    expected = {}
    for label, name in enumerate(["ant", "bee", "cow"]):
        for number in range(4):
            pixels = picture(6, 8, seed=10 * label + number)
            save(folder / name / "deep" / f"{number}.PNG", pixels)
            expected[pixels.tobytes()] = label
    (folder / "notes.txt").write_text("not an image")
    save(folder / "__MACOSX" / "ant" / "._0.png", picture(6, 8))
    save(folder / ".hidden.png", picture(6, 8))
    path = {"folder": folder, "zip": zipped(folder)}.get(form) or zipped(folder, root="set/")
    data = open_data(path, preprocess=Preprocess(scale=1.0))
    assert data.labelled and data.size == 12 and data.class_names == ("ant", "bee", "cow")
    batches = list(data.bind([IMAGE]).batches(5))
    images = joined(batches, "image").transpose(0, 2, 3, 1).astype(np.uint8)
    labels = np.concatenate([batch.labels for batch in batches])
    assert {image.tobytes(): int(label) for image, label in zip(images, labels, strict=True)} == expected


def test_images_side_by_side_have_no_labels(tmp_path: Path) -> None:
    save(tmp_path / "all" / "set" / "1.png", picture(6, 8))
    save(tmp_path / "all" / "set" / "2.png", picture(6, 8, 1))
    for path in (tmp_path / "all", tmp_path / "all" / "set", zipped(tmp_path / "all")):
        data = open_data(path)
        assert not data.labelled and data.size == 2 and data.class_names == ()
        assert all(batch.labels is None for batch in data.bind([IMAGE]).batches(1))


def one_image(tmp_path: Path, pixels: np.ndarray[Any, Any], inputs: InputSpec, **options: Any) -> np.ndarray[Any, Any]:
    save(tmp_path / "one" / "1.png", pixels)
    data = open_data(tmp_path / "one", preprocess=Preprocess(**options))
    return next(data.bind([inputs]).batches(1)).feeds[inputs.name][0]


def test_preprocessing_is_what_training_does(tmp_path: Path) -> None:
    pixels = picture(6, 8)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1).float().div(255)
    expected = ((tensor - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]).numpy()
    np.testing.assert_array_equal(one_image(tmp_path, pixels, IMAGE, mean=mean, std=std), expected)
    bgr = one_image(tmp_path, pixels, IMAGE, mean=mean[::-1], std=std[::-1], channels="BGR")
    np.testing.assert_array_equal(bgr, expected[::-1])
    last = spec("x", "float32", 1, 6, 8, 3)
    nhwc = one_image(tmp_path, pixels, last, mean=mean, std=std, layout="NHWC")
    np.testing.assert_array_equal(nhwc, expected.transpose(1, 2, 0))
    raw = one_image(tmp_path, pixels, spec("x", "uint8", None, 6, 8, 3), scale=1.0, layout="NHWC")
    np.testing.assert_array_equal(raw, pixels)
    grey = one_image(tmp_path, pixels, spec("x", "float32", None, 1, 6, 8), scale=1.0, channels="L")
    np.testing.assert_array_equal(grey[0], np.asarray(PIL.Image.fromarray(pixels).convert("L")))


def test_resize_and_centre_crop(tmp_path: Path) -> None:
    rows, columns = np.mgrid[0:8, 0:12].astype(np.uint8)
    pixels = np.stack([rows, columns, columns], axis=-1)
    cut = one_image(tmp_path, pixels, spec("x", "float32", None, 3, 4, 6), crop=(4, 6), scale=1.0)
    np.testing.assert_array_equal(cut, pixels[2:6, 3:9].transpose(2, 0, 1))
    options = {"size": 4, "crop": 4, "scale": 1.0}
    half = one_image(tmp_path, pixels, spec("x", "float32", None, 3, 4, 4), **options)
    resized = PIL.Image.fromarray(pixels).resize((6, 4), PIL.Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(half, np.asarray(resized)[:, 1:5].transpose(2, 0, 1))
    tall = one_image(tmp_path, pixels.transpose(1, 0, 2), spec("x", "float32", None, 3, 6, 4), size=4)
    assert tall.shape == (3, 6, 4)
    with pytest.raises(
        DataError, match=r"'1.png' is 8 x 12 pixels .* smaller than the crop of 9 x 9; set a larger size"
    ):
        one_image(tmp_path, pixels, spec("x", "float32", None, 3, 9, 9), crop=9)


def test_what_does_not_fit_a_model_is_said(tmp_path: Path) -> None:
    save(tmp_path / "set" / "1.png", picture(6, 8))
    save(tmp_path / "set" / "2.png", picture(5, 8))
    any_size = spec("image", "float32", None, 3, None, None)
    with pytest.raises(DataError, match=r"images of different sizes .* set size = \[height, width\]"):
        list(open_data(tmp_path / "set").bind([any_size]).batches(2))
    assert [len(batch) for batch in open_data(tmp_path / "set").bind([any_size]).batches(1)] == [1, 1]
    with pytest.raises(DataError, match=r"images feed one input, and the model has 2 \('image', 'x'\)"):
        open_data(tmp_path / "set").bind([IMAGE, X])
    with pytest.raises(DataError, match=r"takes pixels from 0 to 255; set scale = 1.0"):
        open_data(tmp_path / "set").bind([spec("image", "uint8", None, 3, None, None)])
    with pytest.raises(DataError, match=r"expected N x 3 x 7 x 8"):
        open_data(tmp_path / "set").bind([spec("image", "float32", None, 3, 7, 8)])


def test_bad_images_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(name: str, data: bytes) -> None:
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_bytes(data)
        for path in (folder, zipped(folder)):
            list(open_data(path).bind([spec("x", "float32", None, 3, None, None)]).batches(1))

    buffer = io.BytesIO()
    PIL.Image.fromarray(picture(64, 64)).save(buffer, "JPEG")
    good = buffer.getvalue()
    read("good.jpg", good)
    with pytest.raises(DataError, match=r"'cut.jpg' cannot be decoded .*; repair or remove it"):
        read("cut.jpg", good[: len(good) // 2])
    with pytest.raises(DataError, match=r"'text.png' cannot be decoded"):
        read("text.png", b"hello")
    with pytest.raises(DataError, match=r"'deep.png' has more than 8 bits"):
        deep = io.BytesIO()
        PIL.Image.fromarray(np.zeros((4, 4), np.uint16)).save(deep, "PNG")
        read("deep.png", deep.getvalue())
    for name, side in (
        ("wide.png", 7100),
        ("bomb.png", 10_000),
        ("huge.png", 13_500),
    ):  # below, at, above Pillow's own limits
        bomb = io.BytesIO()
        PIL.Image.new("1", (side, side)).save(bomb, "PNG")
        with pytest.raises(DataError, match=rf"'{name}' .* pixels; at most 50,000,000"):
            read(name, bomb.getvalue())
    monkeypatch.setattr("edgekit.data.images.MAX_FILE_BYTES", 100)
    with pytest.raises(DataError, match=r"'large.jpg' is [\d,]+ bytes; at most 100 are read"):
        read("large.jpg", good)


def test_bad_collections_are_refused(tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=r"holds no images \(no files at all\)"):
        open_data(tmp_path / "none")
    (tmp_path / "none" / "a.npy").write_bytes(b"")
    with pytest.raises(DataError, match=r"holds no images \(1 with .npy\); expected files with .bmp"):
        open_data(tmp_path / "none")
    (tmp_path / "fake.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"fake.zip: is not a zip file"):
        open_data(tmp_path / "fake.zip")
    save(tmp_path / "set" / "1.png", picture(6, 8))
    whole = zipped(tmp_path / "set").read_bytes()
    locked, damaged = bytearray(whole), bytearray(whole)
    locked[whole.index(b"PK\x01\x02") + 8] |= 1  # the flag "encrypted" in the directory
    damaged[whole.index(b"IDAT") + 20] ^= 255
    for data, message in (
        (locked, r"image '1.png' is encrypted"),
        (damaged, r"'1.png' cannot be unpacked \(Bad CRC-32"),
    ):
        (tmp_path / "bad.zip").write_bytes(data)
        with pytest.raises(DataError, match=message):
            open_data(tmp_path / "bad.zip").bind([IMAGE])
    save(tmp_path / "mixed" / "ant" / "1.png", picture(6, 8))
    save(tmp_path / "mixed" / "2.png", picture(6, 8))
    with pytest.raises(DataError, match=r"1 images \('2.png', ...\) lie beside class folders"):
        open_data(tmp_path / "mixed")


def test_images_are_decoded_batch_by_batch(tmp_path: Path) -> None:
    def peak(count: int) -> int:
        for number in range(count):
            save(tmp_path / f"{count}" / f"{number}.png", np.zeros((64, 64, 3), np.uint8))
        bound = open_data(tmp_path / f"{count}").bind([spec("x", "float32", None, 3, 64, 64)])
        tracemalloc.start()
        try:
            assert sum(len(batch) for batch in bound.batches(4)) == count
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(4)  # imports and caches
    assert peak(160) < peak(16) + 64 * 64 * 3 * 4 * 4  # one more batch, where keeping all would be 36 more


def test_an_npy_file_stays_on_disk(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((4096, 1024), np.float32))
    tracemalloc.start()
    try:
        bound = open_data(tmp_path / "x.npy").bind([spec("x", "float32", None, 1024)])
        assert sum(len(batch) for batch in bound.batches(8)) == 4096
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"size": 0}, r"'size' is 0: .*expected one length or \[height, width\]"),
        ({"crop": [1, 2, 3]}, r"'crop' is \[1, 2, 3\]: .*expected one length"),
        ({"mean": [0.5, 0.5]}, r"'mean' is \[0.5, 0.5\]: .*expected one number or 3"),
        ({"channels": "L", "std": [1, 1, 1]}, r"'std' is .*expected one number or 1, one for each channel of L"),
        ({"std": [0.0]}, r"greater than 0"),
        ({"sise": 8}, r"unknown key 'sise'; did you mean 'size'"),
    ],
)
def test_mistakes_in_the_preprocess_table_are_said(table: dict[str, Any], message: str) -> None:
    with pytest.raises(TargetError, match=message):
        validate(table, Preprocess, path=Path("recipe.toml"))
    assert issubclass(Preprocess, Table)


@pytest.mark.skipif(not ZOO_ZIP.is_file(), reason="the shared model zoo is not here")
def test_the_zoo_s_cifar_zip() -> None:
    table = Preprocess(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    data = open_data(ZOO_ZIP, preprocess=table)
    assert (data.size, len(data.class_names), data.class_names[0]) == (2000, 10, "airplane")
    batches = list(data.bind([spec("input", "float32", None, 3, 32, 32)]).batches(64, 0, 500))
    assert sum(map(len, batches)) == 500
    counts = np.bincount(np.concatenate([batch.labels for batch in batches]), minlength=10)
    assert counts.min() >= 30, "a prefix of the shuffled order mixes the classes"
    images = joined(batches, "input")
    assert abs(images.mean()) < 0.3 and 0.8 < images.std() < 1.4


# Examples, the digits, references


def test_examples_come_before_inputs_are_known(tmp_path: Path) -> None:
    named = example_arrays(open_data({"a": np.zeros((9, 2)), "labels": np.arange(9), "other": np.zeros(3)}), 4)
    assert isinstance(named, dict) and list(named) == ["a"]
    assert named["a"].shape == (4, 2) and named["a"].dtype == np.float32
    by_position = example_arrays(open_data(lambda: [((np.zeros((9, 2)), np.ones((9, 3), np.int64)), np.arange(9))]), 4)
    assert isinstance(by_position, tuple)
    assert [(array.shape, array.dtype.name) for array in by_position] == [((4, 2), "float32"), ((4, 3), "int64")]
    (first,) = example_arrays(open_data(DIGITS.parent / "digits.npz"), 2).values()
    assert first.shape == (2, 1, 8, 8)
    save(tmp_path / "set" / "1.png", picture(6, 8))
    (image,) = example_arrays(open_data(tmp_path / "set", preprocess=Preprocess(scale=1.0)), 2)
    assert image.shape == (1, 3, 6, 8) and image.dtype == np.float32


def test_the_digits_are_real_balanced_and_made_again(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    script = DIGITS.parent / "make_digits.py"
    subprocess.run([sys.executable, script, tmp_path / "again.npz"], check=True, timeout=120)
    # Not the bytes: Pythons differ in the headers of zip files.
    with np.load(tmp_path / "again.npz") as again, np.load(DIGITS) as kept:
        assert list(again) == list(kept)
        assert all(again[name].dtype == kept[name].dtype and (again[name] == kept[name]).all() for name in kept)
    data = open_data(DIGITS)
    assert data.size == 256 and data.labelled
    batch = next(data.bind([spec("image", "float32", None, 1, 8, 8)]).batches(256))
    assert batch.labels is not None and set(np.bincount(batch.labels).tolist()) == {25, 26}
    assert (batch.feeds["image"].min(), batch.feeds["image"].max()) == (0.0, 1.0)


def test_references_into_files_and_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kit").mkdir()
    (tmp_path / "kit" / "neighbour_of_calib.py").write_text("WIDTH = 3\n")
    file = tmp_path / "kit" / "calib.py"
    file.write_text(
        "import numpy as np\nfrom neighbour_of_calib import WIDTH\n"
        "def batches():\n    yield np.ones((5, WIDTH), np.float32)\n"
        "class Sets:\n    arrays = {'x': np.ones((2, WIDTH), np.float32)}\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for reference in ("kit/calib.py:batches", "kit.calib:batches", f"{file}:batches"):
        assert [len(batch) for batch in open_data(reference).bind([X]).batches(3)] == [3, 2]
    assert open_data("kit.calib:Sets.arrays").size == 2
    first = resolve_reference("kit/calib.py:Sets", error=DataError, what="data")
    assert first is resolve_reference(f"{file}:Sets", error=DataError, what="data")
    file.write_text(file.read_text() + "\nADDED = 1\n")
    assert resolve_reference("kit/calib.py:ADDED", error=DataError, what="data") == 1


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("model.py", r"model factory 'model.py': expected package.module:function or path/file.py:function"),
        ("gone.py:build", r"the file 'gone.py' does not exist"),
        ("no_such_module_here:build", r"there is no module 'no_such_module_here' in the current folder or installed"),
        ("json.nothing:build", r"there is no module 'json.nothing'"),
        ("a b:build", r"'a b' is neither a module's name nor a .py file"),
        ("model.py:biuld", r"model.py has no 'biuld'; did you mean 'build'\?"),
        ("json:loads.nothing_at_all", r"json has no 'nothing_at_all'"),
        (
            "broken.py:build",
            r"broken.py, when loaded, raised ZeroDivisionError: division by zero \(broken.py, line 3\)",
        ),
        ("typo.py:build", r"raised SyntaxError: .*typo.py, line 1"),
        ("needs.py:build", r"raised ModuleNotFoundError: No module named 'not_there_either' \(needs.py, line 1\)"),
        ("needs:build", r"the module needs, when imported, raised ModuleNotFoundError: .*'not_there_either'"),
        ("leaves.py:build", r"raised SystemExit: 1 \(leaves.py, line 2\)"),
    ],
)
def test_what_is_wrong_with_a_reference_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: str, message: str
) -> None:
    (tmp_path / "model.py").write_text("def build():\n    return 1\n")
    (tmp_path / "broken.py").write_text("import math\nA = 1\nB = A / 0\n")
    (tmp_path / "typo.py").write_text("def build(:\n")
    (tmp_path / "needs.py").write_text("import not_there_either\n")
    (tmp_path / "leaves.py").write_text("import sys\nsys.exit(1)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SourceError, match=message):
        resolve_reference(reference, error=SourceError, what="model factory")


def test_reading_data_imports_no_runtime() -> None:
    code = (
        "import edgekit.data, sys; print([m for m in ('torch', 'onnx_ir', 'onnxruntime', 'PIL') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60)
    assert out.stdout.strip() == "[]"


def test_class_folders_named_by_number_are_sorted_by_number(tmp_path: Path) -> None:
    for number in range(12):
        (tmp_path / str(number)).mkdir()
        PIL.Image.new("L", (4, 4), number).save(tmp_path / str(number) / "x.png")
    assert open_data(tmp_path).class_names == tuple(map(str, range(12)))
