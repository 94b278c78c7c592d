"""A pack holds a folder's pictures in its order, however it was written, and names what is wrong with it."""

import hashlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jepax.commands.pack import Pack
from jepax.data import DataConfig, batches, open_source, pack
from jepax.data.sources import CorruptExampleError
from jepax.types import UserError

CANVAS = 48


def photo(path: Path, size: tuple[int, int], mode: str = "RGB", **saved) -> None:
    """Smooth shapes in the picture's own colors, so that a JPEG of them is close to them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(len(path.name) + sum(size))
    small = Image.fromarray(random.integers(0, 256, (4, 4, 3), np.uint8))
    small.resize(size, Image.Resampling.BICUBIC).convert(mode).save(path, **saved)


@pytest.fixture
def photos(tmp_path):
    """Two classes; in each, pictures that fit the canvas, one turned by its EXIF, and larger ones, one of them gray."""
    root = tmp_path / "photos"
    turned = Image.Exif()
    turned[0x0112] = 6
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            folder = root / split / name
            photo(folder / "fits.jpg", (40, 30))
            photo(folder / "fits_too.png", (48, 20))
            photo(folder / "turned.jpg", (40, 20), exif=turned)
            for number in range(4):
                photo(folder / f"large_{number}.jpg", (120 + number, 90))
            photo(folder / "large_gray.jpg", (70, 90), "L")
            photo(folder / "large_turned.jpg", (120, 60), exif=turned)
    return root


def packed(photos: Path, folder: Path, **settings) -> Path:
    pack.pack(
        photos,
        folder,
        pack.PackConfig(**{"canvas_size": CANVAS, "images_per_shard": 4, "num_threads": 2} | settings),
        lambda _: 0,
    )
    return folder


def open_(source: str, root: Path, split: str = "train", **settings):
    return open_source(DataConfig(**{"dataset": source, "root": str(root), "canvas_size": CANVAS} | settings), split)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_it_holds_the_folders_pictures(photos, tmp_path, split):
    folder = open_("image_folder", photos, split, val_fraction=0.3)
    ours = open_("packed", packed(photos, tmp_path / "pack"), split, val_fraction=0.3)
    rows = np.arange(len(folder))
    found, expected = ours.load_batch(rows)[0], folder.load_batch(rows)[0]
    assert ours.files == folder.files and ours.class_names == folder.class_names
    assert (found.size == expected.size).all() and (found.label == expected.label).all()
    for row, file in enumerate(folder.files):
        exact = "fits" in file or "/turned" in file
        off = np.abs(found.canvas[row].astype(int) - expected.canvas[row])
        assert off.max() == 0 if exact else 0 < off.mean() < 2, file
        assert ours.display_name(row) == folder.display_name(row)


def test_grey_pictures_are_one_channel(photos, tmp_path):
    ours = open_("packed", packed(photos, tmp_path / "pack"), "test", channels=1)
    folder = open_("image_folder", photos, "test", channels=1)
    row = folder.files.index("cat/large_gray.jpg")
    off = ours.load(row).image.astype(int) - folder.load(row).image
    assert 0 < np.abs(off).mean() < 1


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.iterdir() if path.name != "lock")
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_threads_do_not_matter_and_nothing_else_stays(photos, tmp_path):
    one, many = (digests(packed(photos, tmp_path / str(count), num_threads=count)) for count in (1, 5))
    assert one == many
    shards = [f"{part}-{number:05d}.array_record" for part in ("train", "val") for number in range(5)]
    assert list(one) == sorted(["pack.json", "train.json", "val.json", *shards])


KILLED = """
import sys, time
from pathlib import Path
from jepax.data import pack
plain = pack.encode_record
def slow(path, config):
    time.sleep(0.1)
    return plain(path, config)
pack.encode_record = slow
pack.pack(Path(sys.argv[1]), Path(sys.argv[2]), pack.PackConfig(canvas_size=48, images_per_shard=4, num_threads=2))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_packing_that_was_killed_goes_on(photos, tmp_path, number):
    folder = tmp_path / "pack"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(photos), str(folder)], stdout=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while not list(folder.glob("*.note")) and time.monotonic() < end:
        time.sleep(0.02)
    os.kill(process.pid, number)
    assert process.wait(30) != 0 and not (folder / "pack.json").exists()
    with pytest.raises(UserError, match=r"is no complete pack"):
        open_("packed", folder)
    done = {path: path.stat().st_mtime_ns for path in folder.glob("*.note")}
    written = {path.with_suffix(".array_record"): path.with_suffix(".array_record").stat().st_mtime_ns for path in done}
    assert written and digests(packed(photos, folder)) == digests(packed(photos, tmp_path / "whole"))
    assert {path: path.stat().st_mtime_ns for path in written} == written  # what was there was not written again


def test_a_full_disk_is_told_in_a_line_and_packing_goes_on(photos, tmp_path):
    """Files may not grow beyond 8 kB."""
    folder = tmp_path / "pack"
    words = ["pack", str(photos), str(folder), "--canvas-size", str(CANVAS), "--images-per-shard", "4"]
    limit = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))"
    command = [sys.executable, "-c", f"{limit}; from jepax.cli import main; main(sys.argv[1:])", *words]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr, ended.stderr
    assert re.search(r"^jepax: .*array_record cannot be written: .*File too large", ended.stderr), ended.stderr
    assert not list(folder.glob("*.part"))
    assert digests(packed(photos, folder)) == digests(packed(photos, tmp_path / "whole"))


def test_the_same_batches_from_threads_and_workers(photos, tmp_path):
    source = open_("packed", packed(photos, tmp_path / "pack"), val_fraction=0.0)

    def canvases(**how):
        return [images.canvas.copy() for images in batches(source, batch_size=6, steps=3, seed=0, **how)]

    alone = canvases(num_threads=0)
    for how in ({"num_threads": 4}, {"num_threads": 1, "num_workers": 2}):
        assert all((one == other).all() for one, other in zip(alone, canvases(**how), strict=True))


def test_a_broken_picture_is_named_and_replaced_as_in_the_folder(photos, tmp_path):
    for number in range(200):  # so that one of them is below the share that is put up with
        photo(photos / f"val/cat/more_{number}.jpg", (8, 8))
    (photos / "train/cat/large_1.jpg").write_bytes(b"<html>not found</html>")
    said: list[str] = []
    folder = tmp_path / "pack"
    pack.pack(photos, folder, pack.PackConfig(canvas_size=CANVAS, images_per_shard=4), said.append)
    (warned,) = (line for line in said if "warning" in line)
    assert warned.startswith("warning: train/cat/large_1.jpg cannot be read (its content is none of")
    ours, theirs = open_("packed", folder, val_fraction=0.0), open_("image_folder", photos, val_fraction=0.0)
    marked, expected = (source.load_batch(np.arange(len(ours)))[1] for source in (ours, theirs))
    assert marked.tolist() == expected.tolist() and marked.sum() == 1
    with pytest.raises(CorruptExampleError, match=r"train/cat/large_1\.jpg cannot be read as an image: it is empty"):
        ours.load(int(np.flatnonzero(marked)[0]))


def test_names_that_are_not_utf8_are_packed_and_printed(photos, tmp_path):
    for number in range(100):  # one of them may then be corrupt
        photo(photos / f"val/cat/more_{number}.jpg", (8, 8))
    Path(os.fsdecode(bytes(photos / "train/cat") + b"/caf\xe9.jpg")).write_bytes(b"")
    (photos / "train/cat/a.psd").write_bytes(b"")
    command = [sys.executable, "-m", "jepax.cli", "pack", str(photos), str(tmp_path / "pack"), "--canvas-size", "48"]
    ended = subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"})
    assert ended.returncode == 0, ended.stderr
    assert rb"warning: train/cat/caf\udce9.jpg cannot be read (it is empty)" in ended.stdout
    assert b"train: 19 images of 2 classes; left out of train/: 1 .psd (not a format that is read)" in ended.stdout
    assert open_("packed", tmp_path / "pack").fingerprint.items() >= open_("image_folder", photos).fingerprint.items()


def test_too_many_broken_pictures_end_it(photos, tmp_path):
    for number in range(4):
        (photos / f"train/cat/large_{number}.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"(?s)4 of 36 images cannot be read.*large_0\.jpg: it is empty"):
        packed(photos, tmp_path / "pack")
    assert not (tmp_path / "pack/pack.json").exists()


def test_the_same_again_does_nothing_and_another_pack_is_refused(photos, tmp_path):
    folder = packed(photos, tmp_path / "pack")
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir() if path.name != "lock"}
    packed(photos, folder)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    with pytest.raises(UserError, match="holds another pack"):
        packed(photos, folder, quality=90)
    photo(photos / "train/cat/new.jpg", (9, 9))
    with pytest.raises(UserError, match="holds another pack"):
        packed(photos, folder)


def test_a_damaged_shard_is_named(photos, tmp_path):
    shard = packed(photos, tmp_path / "pack") / "train-00001.array_record"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=r"train-00001\.array_record has \d+ bytes instead of \d+"):
        open_("packed", shard.parent)
    shard.unlink()
    with pytest.raises(UserError, match=r"train-00001\.array_record is missing"):
        open_("packed", shard.parent)


def test_a_folder_that_holds_something_else_is_left_alone(photos, tmp_path):
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack/train.json").write_text("mine")
    with pytest.raises(UserError, match=r"is not empty, it holds train\.json"):
        packed(photos, tmp_path / "pack")
    assert (tmp_path / "pack/train.json").read_text() == "mine"
    with pytest.raises(UserError, match="is not empty"):
        packed(photos, photos)


@pytest.mark.parametrize(
    "told", ["[]", '{"version": 1}', '{"version": 1, "canvas": "48", "classes": [], "shards": {}}']
)
def test_what_is_no_description_of_a_pack_is_refused(photos, tmp_path, told):
    folder = packed(photos, tmp_path / "pack")
    (folder / "pack.json").write_text(told)
    with pytest.raises(UserError, match=r"copy the pack again|is a pack of version"):
        open_("packed", folder)


def test_names_that_do_not_fit_are_refused(photos, tmp_path):
    names = packed(photos, tmp_path / "pack") / "train.json"
    whole = names.read_text()
    for damaged in (whole[:-9], whole.replace("cat/", "bird/"), "[]"):
        names.write_text(damaged)
        with pytest.raises(UserError, match=r"train\.json (cannot be read|does not name the images)"):
            open_("packed", names.parent)


def test_a_picture_that_cannot_be_opened_ends_it(photos, tmp_path, monkeypatch):
    """A disk that fails must not leave empty pictures behind."""
    real = pack.read_file

    def failing(path):
        if path.name == "large_2.jpg":
            raise OSError(5, "Input/output error", str(path))
        return real(path)

    monkeypatch.setattr(pack, "read_file", failing)
    with pytest.raises(UserError, match=r"large_2\.jpg cannot be read"):
        packed(photos, tmp_path / "pack")
    monkeypatch.undo()
    assert digests(packed(photos, tmp_path / "pack")) == digests(packed(photos, tmp_path / "whole"))


def test_flipped_bits_are_noticed(photos, tmp_path):
    """ArrayRecord's checksums; the picture is then as good as a broken file."""
    shard = packed(photos, tmp_path / "pack") / "train-00000.array_record"
    at = shard.read_bytes().index(b"\xff\xd8\xff") + 300
    with shard.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))
    source = open_("packed", shard.parent, val_fraction=0.0)
    assert source.load_batch(np.arange(len(source)))[1].sum() == 1


def test_a_larger_canvas_than_the_packs_is_refused(photos, tmp_path):
    folder = packed(photos, tmp_path / "pack")
    with pytest.raises(UserError, match=r"was packed for data\.canvas_size=48, and 64 asks for more"):
        open_("packed", folder, canvas_size=64)
    assert open_("packed", folder, canvas_size=32).load_batch(np.array([0]))[0].canvas.shape == (1, 32, 32, 3)


def test_its_contents_are_the_folders_and_the_shards(photos, tmp_path):
    folder = packed(photos, tmp_path / "pack")
    contents = open_("packed", folder).fingerprint
    shards = contents.pop("shards")
    assert contents == open_("image_folder", photos).fingerprint
    other = packed(photos, tmp_path / "other", quality=90)
    assert open_("packed", other).fingerprint["shards"] != shards


@pytest.mark.parametrize(
    "words, said",
    [
        (["photos"], "jepax pack takes SRC DST"),
        (["photos", "pack", "--canvas-size", "0"], "--canvas-size 0 must be at least 1"),
        (["photos", "pack", "--quality", "101"], "--quality 101 is not in \\[1, 100\\]"),
        (["photos", "pack", "--side", "9"], "--side; jepax pack takes --canvas-size, --quality"),
    ],
    ids=["folders", "canvas", "quality", "unknown"],
)
def test_what_is_not_understood_is_named(words, said):
    with pytest.raises(UserError, match=said):
        Pack.read("pack", words)


@pytest.mark.parametrize("side", [40, 120])
def test_12_bit_images_are_packed_as_they_are_read(side, photos, tmp_path):
    """One that fits is copied, with its 16 bits; a larger one is scaled down."""
    values = np.linspace(0, 4095, side * side).reshape(side, side).astype(np.uint16)
    Image.fromarray(values).save(photos / "train/cat/deep.png")
    folder = packed(photos, tmp_path / "pack", bit_depth=12)
    settings = {"canvas_size": CANVAS, "val_fraction": 0.0, "channels": 1}
    sources = [
        open_source(DataConfig(dataset="packed", root=str(folder), **settings), "train"),
        open_source(DataConfig(dataset="image_folder", root=str(photos), bit_depth=12, **settings), "train"),
    ]
    images = [source.load(source.files.index("cat/deep.png")).image.astype(int) for source in sources]
    np.testing.assert_allclose(*images, atol=4)
    assert images[0].max() > 250
