"""Data files that are damaged or made to do harm: refused by name, nothing run, nothing outside read or written, little memory."""

from __future__ import annotations

import io
import os
import pickle
import resource
import struct
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from conftest import Cli, TinyFiles, tiny_images
from edgekit.data import InputSpec, Preprocess, open_data
from edgekit.errors import DataError

X = InputSpec("x", np.dtype(np.float32), (None, 3))
IMAGE = InputSpec("x", np.dtype(np.float32), (None, 3, None, None))


def read(path: Path, spec: InputSpec = X, preprocess: Preprocess | None = None) -> int:
    """How many samples come out."""
    return sum(len(batch) for batch in open_data(path, preprocess=preprocess).bind([spec]).batches(4))


def peak(function: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# Arrays.


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("name", ["data.npy", "data.npz", "raw.npy", "raw.npz", "member.npz"])
def test_pickles_are_never_opened(name: str, tiny: TinyFiles, tmp_path: Path, cli: Cli) -> None:
    objects = np.empty(40, object)
    objects[:] = Bomb(tmp_path / "harm")
    if name.startswith("raw"):
        (tmp_path / name).write_bytes(pickle.dumps(objects))
    elif name == "member.npz":
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr("image.npy", pickle.dumps(objects))
    elif name.endswith(".npy"):
        np.save(tmp_path / name, objects, allow_pickle=True)
    else:
        np.savez(tmp_path / name, image=tiny_images(40), labels=objects)
    for option in (("--calibration", tmp_path / name), ("--calibration", tiny.data, "--evaluate", tmp_path / name)):
        done = cli("compress", tiny.model, "-o", tmp_path / "out", *option)
        assert (done.code, done.stdout) == (4, "")
        assert f"{tmp_path / name}: cannot be read (" in done.stderr
    assert not (tmp_path / "harm").exists()
    assert not (tmp_path / "out").exists()
    with pytest.raises(FileNotFoundError):  # the file is what it is meant to be
        pickle.loads(pickle.dumps(Bomb(tmp_path / "no" / "such" / "folder")))


HEADERS = [
    "{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776, 3), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (-4, 3), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (4611686018427387904, 4611686018427387904), }",
    "{'descr': '|O', 'fortran_order': False, 'shape': (4, 3), }",
    "{'descr': '<U2000000000', 'fortran_order': False, 'shape': (4, 3), }",
    "{'descr': 'nonsense', 'fortran_order': False, 'shape': (4, 3), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (4, 3)",
    "{'descr': '<f4', 1: False, 'shape': (4, 3), }",
    "__import__('os').mkdir('harm')",
    "(" * 5000,
]


@pytest.mark.parametrize("ending", [".npy", ".npz"])
@pytest.mark.parametrize("header", HEADERS)
def test_headers_that_no_array_has_are_refused_with_little_memory(
    header: str, ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = header.encode().ljust(118) + b"\n"
    array = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(48)
    path = tmp_path / f"data{ending}"
    if ending == ".npy":
        path.write_bytes(array)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x.npy", array)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match=rf"data{ending}: (cannot be read|does not fit in memory)"):
        read(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**26
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
@pytest.mark.parametrize("ending", [".npy", ".npz", ".zip"])
def test_flipped_bits_are_survived_or_explained(ending: str, compression: int, tmp_path: Path) -> None:
    buffer, member = io.BytesIO(), io.BytesIO()
    if ending == ".zip":
        PIL.Image.fromarray(np.random.default_rng(0).integers(0, 255, (6, 8, 3), np.uint8)).save(member, "PNG")
    else:
        np.save(member, np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32))
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr("1.png" if ending == ".zip" else "x.npy", member.getvalue())
    whole = member.getvalue() if ending == ".npy" else buffer.getvalue()
    path = tmp_path / f"data{ending}"
    for seed in range(60):
        rng = np.random.default_rng(seed)
        data = np.frombuffer(whole, np.uint8).copy()
        data[rng.integers(0, len(data), rng.integers(1, 4))] ^= np.uint8(1 << rng.integers(8))
        path.write_bytes(data.tobytes() if seed % 2 else data[: rng.integers(len(data))].tobytes())
        try:
            assert read(path, IMAGE if ending == ".zip" else X)
        except DataError as error:
            assert str(path) in str(error)


def test_what_unpacks_to_far_more_than_its_size_is_refused_before_it_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez_compressed(tmp_path / "bomb.npz", x=np.zeros((2**20, 3), np.float32))
    assert open_data(tmp_path / "bomb.npz").size == 2**20  # of a size that does no harm
    monkeypatch.setattr("edgekit.data.datasets.MAX_UNPACKED", 2**20)

    def refuse() -> None:
        with pytest.raises(
            DataError, match=r"bomb\.npz: unpacks to 12,583,\d+ bytes, more than 100 times its own size"
        ):
            open_data(tmp_path / "bomb.npz")

    assert peak(refuse) < 2**20
    np.savez(tmp_path / "whole.npz", x=np.zeros((2**18, 3), np.float32))
    assert open_data(tmp_path / "whole.npz").size == 2**18  # more than the bound, and as much on disk


def test_a_member_is_not_read_beyond_the_size_that_it_states(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "liar.npz", x=np.zeros((2**21, 3), np.float32))
    data = bytearray((tmp_path / "liar.npz").read_bytes())
    entry = data.index(b"PK\x01\x02")
    data[entry + 24 : entry + 28] = struct.pack("<I", 200)
    (tmp_path / "liar.npz").write_bytes(data)
    with pytest.raises(DataError, match=r"liar\.npz: cannot be read"):
        open_data(tmp_path / "liar.npz")


# Images.


def encoded(kind: str, height: int = 6, width: int = 8) -> bytes:
    """A picture of noise."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(height).integers(0, 255, (height, width, 3), np.uint8)
    PIL.Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def zipped(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_names_that_lead_out_of_a_zip_touch_nothing(tmp_path: Path, cli: Cli, tiny: TinyFiles) -> None:
    inside = tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    (tmp_path / "x.png").write_bytes(encoded("PNG", 9, 9))  # what the names lead to
    names = ["../../x.png", "../../new.png", str(tmp_path / "absolute.png"), "..\\..\\new.png", "c/../../../new.png"]
    for number, name in enumerate(names):
        zipped(inside / f"{number}.zip", {name: encoded("PNG")})
    before = files(tmp_path)
    for number, name in enumerate(names):
        if ".." in name:
            with pytest.raises(DataError, match=rf"{number}\.zip: holds no images"):
                read(inside / f"{number}.zip", IMAGE)
            done = cli("compress", tiny.model, "-o", tmp_path / "out", "--calibration", inside / f"{number}.zip")
            assert (done.code, done.stdout) == (4, "")
        else:
            [batch] = open_data(inside / f"{number}.zip").bind([IMAGE]).batches(4)
            assert batch.feeds["x"].shape == (1, 3, 6, 8)  # the member, not a file of that name
    assert files(tmp_path) == before


def test_zips_in_zips_are_not_opened(tmp_path: Path) -> None:
    inner = zipped(tmp_path / "inner.zip", {"1.png": encoded("PNG")}).read_bytes()
    with pytest.raises(DataError, match=r"outer\.zip: holds no images \(1 with \.zip\)"):
        read(zipped(tmp_path / "outer.zip", {"inner.zip": inner}), IMAGE)
    with pytest.raises(DataError, match=r"outer\.zip: image 'inner\.png' cannot be decoded"):
        read(zipped(tmp_path / "outer.zip", {"inner.png": inner}), IMAGE)
    with pytest.raises(DataError, match=r"outer\.npz: cannot be read"):
        read(zipped(tmp_path / "outer.npz", {"x.npy": inner}))


def test_an_image_that_unpacks_to_too_much_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    data = bytearray(encoded("BMP"))
    data[18:26] = struct.pack("<ii", 2**20, 2**20)
    path = zipped(tmp_path / "bomb.zip", {"1.bmp": bytes(data)})

    def refuse() -> None:
        with pytest.raises(DataError, match=r"bomb\.zip: image '1\.bmp' .*pixels; at most 50,000,000"):
            read(path, IMAGE)

    assert peak(refuse) < 2**22


def test_a_line_of_pixels_is_not_resized_to_more_than_an_image_may_have(tmp_path: Path) -> None:
    path = zipped(tmp_path / "line.zip", {"1.png": encoded("PNG", 1, 5000)})
    with pytest.raises(
        DataError, match=r"'1\.png' is 1 x 5000 pixels .* resizes to 224 x 1,120,000; at most 50,000,000"
    ):
        read(path, IMAGE, Preprocess(size=224, crop=224))
    assert read(path, IMAGE, Preprocess(size=(16, 16))) == 1


SIZELESS = {
    "gif": b"GIF89a" + bytes(7) + b"," + bytes(9) + b"\x02\x01\x00\x00;",
    "bmp": encoded("BMP")[:18] + bytes(8) + encoded("BMP")[26:],
    "ppm": b"P6\n0 0\n255\n",
    "png": encoded("PNG")[:16]
    + bytes(8)
    + b"\x08\x02\0\0\0"
    + struct.pack(">I", zlib.crc32(b"IHDR" + bytes(8) + b"\x08\x02\0\0\0")),
    "jpg": b"",
}


@pytest.mark.parametrize("ending", SIZELESS)
def test_images_of_no_size_are_named(ending: str, tmp_path: Path) -> None:
    path = zipped(tmp_path / "set.zip", {f"1.{ending}": SIZELESS[ending]})
    with pytest.raises(
        DataError, match=rf"set\.zip: image '1\.{ending}' cannot be decoded \(no image of a known format\)"
    ):
        read(path, IMAGE)


def test_a_tag_of_another_type_than_the_decoder_expects(tmp_path: Path) -> None:
    data = bytearray(encoded("TIFF"))
    entry = data.index(struct.pack("<HH", 273, 4))  # where the strips are
    data[entry + 2 : entry + 4] = struct.pack("<H", 5)  # as a rational number
    path = zipped(tmp_path / "set.zip", {"1.tif": bytes(data)})
    with pytest.raises(DataError, match=r"image '1\.tif' cannot be decoded \('IFDRational' object cannot"):
        read(path, IMAGE)


@pytest.mark.parametrize("kind", ["BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP"])
@pytest.mark.filterwarnings("ignore::UserWarning:PIL.*")
def test_damaged_images_are_survived_or_named(kind: str, tmp_path: Path) -> None:
    whole = encoded(kind)
    name = f"1.{kind.lower()}"
    for seed in range(80):
        rng = np.random.default_rng(seed)
        data = np.frombuffer(whole, np.uint8).copy()
        data[rng.integers(0, min(len(data), 150), rng.integers(1, 4))] = rng.integers(256)
        (tmp_path / name).write_bytes(data.tobytes())
        try:
            assert read(tmp_path, IMAGE) == 1
        except DataError as error:
            assert f"image {name!r}" in str(error)


def test_class_folders_of_absurd_numbers_are_sorted_all_the_same(tmp_path: Path) -> None:
    path = zipped(tmp_path / "set.zip", {"9" * 5000 + "/1.png": encoded("PNG"), "10/1.png": encoded("PNG")})
    assert open_data(path).class_names == ("10", "9" * 5000)


def test_a_broken_image_in_a_folder_is_named_and_nothing_is_written(tmp_path: Path, cli: Cli, tiny: TinyFiles) -> None:
    (tmp_path / "recipe.toml").write_text('[data.preprocess]\nchannels = "L"\n')
    (tmp_path / "set").mkdir()
    for number in range(40):
        (tmp_path / "set" / f"{number:02}.png").write_bytes(encoded("PNG", 8, 8))
    arguments = ("--calibration", tmp_path / "set", "--recipe", tmp_path / "recipe.toml", "--proxy", "none")
    for number in (0, 17, 39):
        path = tmp_path / "set" / f"{number:02}.png"
        path.write_bytes(encoded("PNG", 8, 8)[:60])
        done = cli("compress", tiny.model, "-o", tmp_path / "out", *arguments)
        assert (done.code, done.stdout) == (4, "")
        assert f"{tmp_path / 'set'}: image '{path.name}' cannot be decoded" in done.stderr
        assert "Traceback" not in done.stderr
        assert not (tmp_path / "out").exists()
        path.write_bytes(encoded("PNG", 8, 8))
    assert cli("compress", tiny.model, "-o", tmp_path / "out", *arguments).code == 0
