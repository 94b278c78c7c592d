"""ImageNet's layout: which files are found, in which order, in which split."""

import re

import numpy as np
import pytest
from PIL import Image

from jepax.data import DataConfig, batches, open_source
from jepax.data.decode import IMAGE_SUFFIXES, OPTIONAL_SUFFIXES
from jepax.data.sources import image_folder
from jepax.types import UserError


def picture(path, gray, size=(5, 3)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, gray).save(path)


@pytest.fixture
def root(tmp_path):
    for number in range(10):
        picture(tmp_path / f"train/cat/{number}.png", number)
        picture(tmp_path / f"train/Dog/deep/er/{number}.PNG", 10 + number)
    picture(tmp_path / "val/cat/x.bmp", 100, (40, 20))
    picture(tmp_path / "train/cat/.hidden.png", 0)
    (tmp_path / "train/cat/readme.txt").write_text("no picture")
    (tmp_path / "train/.cache").mkdir()
    return tmp_path


def open_(root, split, **settings):
    return open_source(DataConfig(dataset="image_folder", root=str(root), canvas_size=16, **settings), split)


def grays(source):
    return source.load_batch(np.arange(len(source)))[0].canvas[:, 0, 0, 0].tolist()


def test_splits(root):
    train, validation, test = (open_(root, split) for split in ("train", "validation", "test"))
    assert (len(train), len(validation), len(test)) == (18, 2, 1)
    assert train.class_names == test.class_names == ("Dog", "cat") and train.canvas_shape == (16, 16, 3)
    assert sorted(grays(train) + grays(validation)) == list(range(20))
    assert validation.labels.tolist() == [0, 1] and test.labels.tolist() == [1]
    images, _ = test.load_batch(np.array([0]))
    assert images.size.tolist() == [[8, 16]] and images.label.tolist() == [1]
    assert (images.canvas[0, :8] == 100).all() and not images.canvas[0, 8:].any()


def test_files_that_are_not_read_are_counted_by_reason(root, monkeypatch):
    monkeypatch.setattr(image_folder, "IMAGE_SUFFIXES", IMAGE_SUFFIXES - set(OPTIONAL_SUFFIXES))  # without the extra
    for path in ("cat/a.heic", "Dog/deep/b.HEIC", "loose.png", "cat/LICENSE"):
        (root / "train" / path).write_bytes(b"content")
    expected = (
        '2 .heic (read with the extra: pip install ".[formats]"), 1 .txt (not a format that is read), 1 hidden,'
        " 1 outside of the class folders, 1 without an extension (not a format that is read)"
    )
    train, validation, test = (open_(root, split).describe() for split in ("train", "validation", "test"))
    assert train == f"18 images of 2 classes; left out of train/: {expected}"
    assert (validation, test) == ("2 images of 2 classes", "1 image of 2 classes")
    for number in range(20):
        (root / f"train/cat/frame.{number}").write_bytes(b"content")
    assert open_(root, "train").describe().endswith(", 1 .11 (not a format that is read), 20 others")


def test_listing_is_sorted(root):
    assert grays(open_(root, "train", val_fraction=0.0, channels=1)) == [*range(10, 20), *range(10)]


def test_batches_are_shuffled_over_the_classes(root):
    source = open_(root, "train", val_fraction=0.0)
    stream = batches(source, batch_size=4, steps=5, seed=0)
    seen = [gray for images in stream for gray in images.canvas[:, 0, 0, 0].tolist()]
    assert sorted(seen) == list(range(20)) and seen != grays(source)


def test_a_broken_file_is_named(root):
    (root / "val/cat/x.bmp").write_bytes(b"BM")
    with pytest.raises(UserError, match=r"val/cat/x\.bmp cannot be read"):
        open_(root, "test").load(0)


def test_a_broken_file_is_named_from_a_worker_too(root):
    (root / "val/cat/x.bmp").write_bytes(b"BM")
    stream = batches(open_(root, "test"), batch_size=1, steps=1, seed=0, num_threads=1, num_workers=1)
    with pytest.raises(UserError, match=r"val/cat/x\.bmp cannot be read"):
        next(stream)


@pytest.mark.parametrize(
    "folders, words",
    [
        (["Train/cat", "Val/cat"], "it has Train, Val."),
        (["training/cat", "test/cat"], "it has test, training."),
        ([f"class {number}" for number in range(8)], "it has class 0, class 1, class 2, class 3, class 4 and 3 more."),
        ([".cache"], "it has no folders."),
    ],
)
def test_an_error_names_what_is_there(folders, words, tmp_path):
    for name in folders:
        (tmp_path / name).mkdir(parents=True)
    with pytest.raises(UserError, match=rf"has no folder train/: {re.escape(words)}"):
        open_(tmp_path, "train")
    with pytest.raises(UserError, match="it is no folder itself"):
        open_(tmp_path / "elsewhere", "train")


@pytest.mark.parametrize("part", ["train", "val"])
def test_one_class_under_two_encodings_of_its_name_is_refused(part, root):
    for name in ("caf\u00e9", "cafe\u0301"):
        picture(root / part / name / "a.png", 0)
    with pytest.raises(UserError, match=r"'cafe\\u0301' and 'caf\\xe9' are two folders of one name"):
        open_(root, "test")


@pytest.mark.parametrize(
    "fraction, images, advice", [(0.1, 3, "try 0.34, or"), (0.0, 10, "try 0.1, or"), (0.4, 1, "add")]
)
def test_the_fraction_that_an_error_advises_holds_images_out(fraction, images, advice, tmp_path):
    for number in range(images):
        picture(tmp_path / f"train/cat/{number}.png", number)
    with pytest.raises(UserError, match=rf"val_fraction={fraction} leaves no image .*\n.*; {advice}"):
        open_(tmp_path, "validation", val_fraction=fraction)
    if images > 1:
        advised = float(advice.split()[1].strip(","))
        sizes = [len(open_(tmp_path, split, val_fraction=advised)) for split in ("validation", "train")]
        assert sizes == [1, images - 1]


@pytest.mark.parametrize("bits", [12, 14, 10])
def test_16_bit_images_that_use_few_bits_are_warned_of(bits, tmp_path):
    """The advice is taken: the brightest pixel becomes 255, or nearly, and the warning ends."""
    values = np.arange(0, 2**bits, 2**bits // 64, dtype=np.uint16).reshape(8, 8)
    values[-1, -1] = 2**bits - 1
    path = tmp_path / "train/cat/a.png"
    path.parent.mkdir(parents=True)
    Image.fromarray(values).save(path)
    dark, bright = (open_(tmp_path, "train", val_fraction=0.0, bit_depth=depth) for depth in (16, bits))
    assert f"the largest value of the 16-bit images is {2**bits - 1:,} of 65,535" in dark.describe()
    assert f": --data.bit-depth {bits} (" in dark.describe() and "warning" not in bright.describe()
    image = bright.load(0).image[..., 0]
    np.testing.assert_array_equal(image, values >> (bits - 8))
    assert image.max() == 255 and dark.load(0).image.max() == 2 ** (bits - 8) - 1
    assert open_(tmp_path, "train", val_fraction=0.0, bit_depth=8).load(0).image.max() == 255  # clipped, not wrapped


def test_bright_16_bit_and_8_bit_images_are_not_warned_of(root):
    Image.fromarray(np.full((8, 8), 2**15, np.uint16)).save(root / "train/cat/a.tif")
    (root / "train/cat/corrupt.tif").write_bytes(b"no image")
    assert "warning" not in open_(root, "train").describe()


@pytest.mark.parametrize("missing, split", [("val", "test"), ("train", "train"), ("train", "test")])
def test_a_missing_folder_is_named(root, missing, split):
    (root / missing).rename(root / "elsewhere")
    with pytest.raises(UserError, match=rf"data\.root=.* has no folder {missing}/"):
        open_(root, split)


def test_a_class_unknown_to_train_is_refused(root):
    picture(root / "val/wolf/a.png", 0)
    with pytest.raises(UserError, match="val/wolf is no class of train/"):
        open_(root, "test")


def test_a_folder_without_pictures_is_refused(tmp_path):
    picture(tmp_path / "train/a.png", 0)
    with pytest.raises(UserError, match="no image found under train/CLASS/"):
        open_(tmp_path, "train")
