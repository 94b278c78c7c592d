"""Images corrupted on disk, as they are in the wild, under a folder that is being read."""

import io
import json
import os
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import jepax
from jepax.data import CorruptLog, DataConfig, batches, open_source
from jepax.io import config_yaml as configs
from jepax.types import UserError

PER_CLASS = 10
VICTIM = 13
GRAYS = {"cat": 40, "dog": 200}


def photo(gray, side=8, mode="L"):
    return Image.fromarray(np.full((side, side), gray, np.uint8)).convert(mode)


def saved(image, format, **settings):
    file = io.BytesIO()
    image.save(file, format, **settings)
    return file.getvalue()


def bomb(side):
    """A PNG of side x side black pixels, one bit each: under 200 kB."""

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    row = bytes(1 + (side + 7) // 8)
    packer = zlib.compressobj(9)
    packed = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


@pytest.fixture
def root(tmp_path):
    """Ten pictures each of cats, which are dark, and of dogs, which are light."""
    root = tmp_path / "data"
    for label, (name, gray) in enumerate(GRAYS.items()):
        (root / "train" / name).mkdir(parents=True)
        for number in range(PER_CLASS):
            photo(gray + number).save(root / f"train/{name}/{label * PER_CLASS + number:02}.png")
    return root


def opened(root, split="train", **settings):
    settings = {"val_fraction": 0.0, "canvas_size": 8, "channels": 1} | settings
    return open_source(DataConfig(dataset="image_folder", root=str(root), **settings), split)


NAME = f"train/dog/{VICTIM}.png"


def victim(root):
    return root / NAME


def read_whole(source, run, share=0.1):
    """The grays that an epoch shows, its labels, and the run's list of broken files."""
    lines = []
    broken = CorruptLog(source, run / "corrupt.jsonl", share, lines.append)
    stream = list(batches(source, batch_size=5, steps=len(source) // 5, seed=0, num_threads=1, on_corrupt=broken))
    grays = np.concatenate([images.canvas[:, 0, 0, 0] for images in stream]).tolist()
    labels = np.concatenate([images.label for images in stream]).tolist()
    path = run / "corrupt.jsonl"
    listed = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    assert len(lines) == len(listed)
    return grays, labels, listed


def stands_in(root, run, why):
    """The next dog is seen twice, the victim never, every label is right, and the list names the file and the cause."""
    grays, labels, listed = read_whole(opened(root), run)
    replaced = GRAYS["dog"] + VICTIM - PER_CLASS
    expected = [gray + number for gray in GRAYS.values() for number in range(PER_CLASS)]
    expected[VICTIM] = replaced + 1
    assert sorted(grays) == sorted(expected)
    assert labels == [int(gray >= GRAYS["dog"]) for gray in grays]
    assert [entry["file"] for entry in listed] == [NAME]
    assert why in listed[0]["why"]


def alone(program, *arguments, cwd=None):
    """What the program prints, run in a process of its own."""
    package = str(Path(jepax.__file__).parents[1])
    command = [sys.executable, "-W", "ignore", "-c", program, *arguments]
    environment = {**os.environ, "PYTHONPATH": package}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout


HTML = b"<!DOCTYPE html><html><head><title>404 Not Found</title></head></html>"
JPEG = saved(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)), "JPEG")
PNG = saved(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)), "PNG")
FLAT = photo(9).convert("F")
KINDS = {
    "a truncated JPEG": (JPEG[: len(JPEG) // 2], "truncated"),
    "a truncated PNG": (PNG[: len(PNG) // 2], "truncated"),
    "a header alone": (JPEG[:4], ""),
    "an empty file": (b"", "it is empty"),
    "a page of HTML": (HTML, "none of JPEG"),
    "one pixel": (saved(photo(7, 1), "PNG"), "1 x 1 pixels are no image"),
    "one row": (saved(photo(7).crop((0, 0, 8, 1)), "JPEG"), "8 x 1 pixels are no image"),
    "floats": (saved(FLAT, "TIFF"), "no known range"),
    "32-bit integers": (saved(photo(9).convert("I"), "TIFF"), "no known range"),
}


@pytest.mark.fault(13, "a picture that cannot be read")
@pytest.mark.parametrize("kind", KINDS)
def test_bad_content_gives_way_to_the_next_of_its_class(root, tmp_path, kind):
    content, why = KINDS[kind]
    victim(root).write_bytes(content)
    stands_in(root, tmp_path / "run", why)


@pytest.mark.fault(13, "a picture that vanishes after the folder was listed")
@pytest.mark.parametrize("workers", [0, 1])
def test_a_vanished_file_gives_way(root, tmp_path, workers):
    source = opened(root)
    victim(root).unlink()
    broken = CorruptLog(source, tmp_path / "run/corrupt.jsonl", 0.1, print)
    seen = list(batches(source, batch_size=20, steps=1, seed=0, num_threads=1, num_workers=workers, on_corrupt=broken))
    assert seen[0].canvas.shape[0] == 20 and [*broken.why] == [NAME]
    assert "No such file" in broken.why[NAME]


STRANGER = """
import os, sys
import numpy as np
from jepax.data import CorruptLog, DataConfig, open_source
source = open_source(DataConfig(dataset="image_folder", root="data", canvas_size=8, val_fraction=0.0), "train")
source.load(0)  # all that reading loads is loaded
if os.geteuid() == 0:  # whom no permission stops
    os.seteuid(65534)
images, replaced = source.load_batch(np.array([0, 13]))
broken = CorruptLog(source, None, 1.0, print)
print(replaced.tolist(), int(images.canvas[1, 0, 0, 0]), images.label.tolist())
broken(np.array([13]))
"""


@pytest.mark.fault(13, "a picture without permission to read it")
def test_a_file_that_may_not_be_read_gives_way(root):
    victim(root).chmod(0)
    root.parent.chmod(0o755)  # paths are relative from here on: a stranger need not pass the folders above
    shown, told = alone(STRANGER, cwd=root.parent).splitlines()
    assert shown == f"[False, True] {GRAYS['dog'] + VICTIM - PER_CLASS + 1} [0, 1]"
    assert told.startswith("warning: train/dog/13.png cannot be read ([Errno 13] Permission denied")


@pytest.mark.fault(13, "a picture with 16 bits a pixel")
def test_sixteen_bits_are_read_rightly_and_not_replaced(root, tmp_path):
    deep = np.full((8, 8), (GRAYS["dog"] + VICTIM - PER_CLASS) * 256 + 77, np.uint16)
    Image.fromarray(deep).save(victim(root))
    grays, _, listed = read_whole(opened(root), tmp_path / "run")
    assert sorted(grays) == [gray + number for gray in GRAYS.values() for number in range(PER_CLASS)]
    assert listed == []


@pytest.mark.fault(13, "a folder that is gone")
def test_a_lost_folder_ends_the_run_with_the_files_named(root, tmp_path):
    source = opened(root)
    shutil.rmtree(root)
    with pytest.raises(
        UserError, match=r"No such file(.|\n)*tried in its place: train/\w+/\d\d\.png, (.|\n)*still there"
    ):
        read_whole(source, tmp_path / "run", share=1.0)


@pytest.mark.fault(13, "more pictures that cannot be read than may be")
def test_too_many_end_the_run_and_are_listed(root, tmp_path):
    for number in (11, 13, 15):
        (root / f"train/dog/{number}.png").write_bytes(HTML)
    with pytest.raises(UserError, match=r"data\.max_corrupt_fraction=0\.1 of 20 examples may be corrupt, but 3 are"):
        read_whole(opened(root), tmp_path / "run", share=0.1)
    assert len((tmp_path / "run/corrupt.jsonl").read_text().splitlines()) == 3


READER = """
import resource, sys
import numpy as np
from jepax.data import DataConfig, open_source
source = open_source(DataConfig(dataset="image_folder", root=sys.argv[1], canvas_size=8, val_fraction=0.0), "train")
good = source.load(0)  # all that reading loads is loaded
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
images, replaced = source.load_batch(np.array([0, 13]))
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(replaced.tolist(), int(images.canvas[1, 0, 0, 0]), images.label.tolist(), grown // 1024)
"""


@pytest.mark.fault(14, "a small file that decodes to gigabytes")
@pytest.mark.parametrize("side", [30_000, 12_000])  # 12,000: what Pillow itself would only warn of
def test_a_bomb_is_refused_by_its_header(root, side):
    victim(root).write_bytes(bomb(side))
    assert victim(root).stat().st_size < 200_000
    shown, megabytes = alone(READER, str(root)).rsplit(maxsplit=1)
    assert shown == f"[False, True] {GRAYS['dog'] + VICTIM - PER_CLASS + 1} [0, 1]"
    assert int(megabytes) < 32


@pytest.mark.fault(14, "a small file that decodes to gigabytes")
def test_pillow_prints_no_warning_of_its_own(tmp_path):
    (tmp_path / "a.png").write_bytes(bomb(12_000))
    program = "import sys, pathlib, jepax.data.decode as d; d.read_image(pathlib.Path(sys.argv[1]), (8, 8, 3))"
    environment = os.environ | {"PYTHONPATH": str(Path(jepax.__file__).parents[1])}
    command = [sys.executable, "-c", program, str(tmp_path / "a.png")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert "are over the limit of" in done.stderr and "DecompressionBombWarning" not in done.stderr


@pytest.mark.fault(14, "a small file that decodes to gigabytes")
def test_a_bomb_is_listed_with_its_size(root, tmp_path):
    victim(root).write_bytes(bomb(30_000))
    stands_in(root, tmp_path / "run", "900000000 pixels")


@pytest.mark.fault(18, "a file added to the data or removed from it")
@pytest.mark.parametrize("number", range(20, 26))  # into whichever split it falls
def test_an_added_file_changes_what_the_data_is(root, number):
    before = opened(root, val_fraction=0.3).fingerprint
    photo(1).save(root / f"train/dog/{number}.png")
    for split in ("train", "validation"):
        (line,) = configs.diff(before, opened(root, split, val_fraction=0.3).fingerprint)
        assert line.startswith("class dog: 10 files, ") and " -> 11 files, " in line


@pytest.mark.fault(18, "a file added to the data or removed from it")
def test_a_removed_renamed_or_moved_file_changes_what_the_data_is(root):
    before = opened(root).fingerprint
    content = victim(root).read_bytes()
    victim(root).unlink()
    (line,) = configs.diff(before, opened(root).fingerprint)
    assert line.startswith("class dog: 10 files, ") and " -> 9 files, " in line
    (root / "train/dog/other.png").write_bytes(content)
    (line,) = configs.diff(before, opened(root).fingerprint)
    assert line.startswith("class dog: 10 files, ") and " -> 10 files, " in line
    (root / "train/dog/other.png").rename(root / "train/cat/13.png")
    lines = configs.diff(before, opened(root).fingerprint)
    assert [line.split(":")[0] for line in lines] == ["class cat", "class dog"]


@pytest.mark.fault(18, "a class added to the data or removed from it")
def test_an_added_class_changes_what_the_data_is(root):
    before = opened(root).fingerprint
    (root / "train/emu").mkdir()
    photo(1).save(root / "train/emu/0.png")
    (line,) = configs.diff(before, opened(root).fingerprint)
    assert line.startswith("class emu: (absent) -> 1 file, ")


@pytest.mark.fault(18, "the same data elsewhere")
def test_a_copy_in_another_order_is_the_same_data(root, tmp_path):
    for path in sorted(root.glob("train/*/*"), reverse=True):
        copy = tmp_path / "copy" / path.relative_to(root)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    assert opened(tmp_path / "copy").fingerprint == opened(root).fingerprint
    assert opened(root, "validation", val_fraction=0.3).fingerprint == opened(root).fingerprint


@pytest.mark.fault(18, "other generated pictures")
def test_what_generated_pictures_are_made_from_tells_them_apart():
    settings = [
        {},
        {"synthetic_size": 90},
        {"synthetic_seed": 1},
        {"synthetic_variable_size": True},
        {"canvas_size": 9},
    ]
    made = [
        open_source(DataConfig(**({"dataset": "synthetic", "canvas_size": 8, "synthetic_size": 80} | each)), "train")
        for each in settings
    ]
    assert len({str(source.fingerprint) for source in made}) == len(made)
