"""Finding, checking and fetching Fashion-MNIST, on made-up pictures; no network."""

import gzip
import hashlib
import io
import tracemalloc

import numpy as np
import pytest

from jepax.data import DataConfig, open_source
from jepax.data.sources import fashion_mnist
from jepax.types import UserError

COUNT = 20


def idx(name: str) -> bytes:
    generator = np.random.default_rng(len(name))
    if "labels" in name:
        return bytes(8) + (np.arange(COUNT) % 2).astype(np.uint8).tobytes()
    return bytes(16) + generator.integers(0, 256, COUNT * 784, dtype=np.uint8).tobytes()


PUBLISHED = fashion_mnist.FILES
FILES = {name: idx(name) for name in PUBLISHED}


def write(folder, names=tuple(FILES), compress=True):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / (f"{name}.gz" if compress else name)).write_bytes(
            gzip.compress(FILES[name]) if compress else FILES[name]
        )


def refuse():
    raise OSError("no route")


def serve(monkeypatch, content):
    """Replaces the network: `content` of a file's name is what its address answers."""

    def urlopen(url, timeout):
        assert url.startswith("https://") and url.endswith(".gz") and timeout <= 10
        return io.BytesIO(content(url.rpartition("/")[2].removesuffix(".gz")))

    monkeypatch.setattr(fashion_mnist.urllib.request, "urlopen", urlopen)


def published(name):
    return gzip.compress(FILES[name])


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Made-up files, no system folder, an empty cache and no network."""
    files = {name: (len(content), hashlib.sha256(content).hexdigest()) for name, content in FILES.items()}
    monkeypatch.setattr(fashion_mnist, "FILES", files)
    monkeypatch.setattr(fashion_mnist, "SYSTEM_DIR", tmp_path / "system")
    serve(monkeypatch, lambda name: refuse())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("compress", [True, False])
def test_read_from_root(tmp_path, compress):
    write(tmp_path / "here", compress=compress)
    source = open_source(DataConfig(root=str(tmp_path / "here")), "test")
    images, replaced = source.load_batch(np.array([3, 0]))
    assert not replaced.any() and images.canvas[1].tobytes() == source.load(0).image.tobytes()
    assert images.canvas[0].tobytes() == FILES["t10k-images-idx3-ubyte"][16 + 3 * 784 : 16 + 4 * 784]
    assert images.size.tolist() == [[28, 28]] * 2 and images.label.tolist() == [1, 0] and source.classes == 10


def test_splits_are_disjoint_and_channels_repeat(tmp_path):
    write(tmp_path / "system")
    config = DataConfig(channels=3)
    parts = [open_source(config, split) for split in ("train", "validation", "test")]
    assert [len(part) for part in parts] == [18, 2, 20]
    seen = {picture.tobytes() for part in parts for picture in part.images}
    assert len(seen) == 40 and parts[0].canvas_shape == (28, 28, 3)
    canvas = parts[0].load_batch(np.arange(2))[0].canvas
    np.testing.assert_array_equal(canvas[..., 0], canvas[..., 2])


def test_wrong_content_under_root_is_refused(tmp_path, monkeypatch):
    write(tmp_path)
    monkeypatch.setitem(fashion_mnist.FILES, "train-labels-idx1-ubyte", (COUNT + 8, "0" * 64))
    with pytest.raises(UserError, match=r"data\.root=.*train-labels-idx1-ubyte\.gz is not the published"):
        open_source(DataConfig(root=str(tmp_path)), "train")


@pytest.mark.parametrize(
    "damage",
    [b"\x1f\x8bnonsense", gzip.compress(b"x" * 999)[:-12], gzip.compress(bytes(99))[:15] + b"\xff" * 9],
    ids=["nonsense", "cut short", "spoilt"],  # the bytes hold the time
)
def test_damaged_files_under_root_are_refused(tmp_path, damage):
    write(tmp_path)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(damage)
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte\.gz is corrupt"):
        open_source(DataConfig(root=str(tmp_path)), "train")


@pytest.mark.parametrize("compress", [True, False])
def test_a_file_that_grows_without_end_is_not_read_to_it(tmp_path, monkeypatch, compress):
    write(tmp_path, compress=compress)
    open_source(DataConfig(root=str(tmp_path)), "train")  # as long as published: read
    path = tmp_path / ("train-images-idx3-ubyte" + ".gz" * compress)
    path.write_bytes(gzip.compress(bytes(2**26)) if compress else bytes(2**26))
    tracemalloc.start()
    with pytest.raises(UserError, match=rf"longer than its {COUNT * 784 + 16} bytes"):
        open_source(DataConfig(root=str(tmp_path)), "train")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**22


def test_sizes_are_those_of_the_published_arrays():
    images, labels = 28 * 28, 1
    for name, (size, _) in PUBLISHED.items():
        count = 60_000 if name.startswith("train") else 10_000
        assert size == (8 + count * labels if "labels" in name else 16 + count * images)


def test_missing_under_root_is_refused_without_looking_elsewhere(tmp_path):
    write(tmp_path / "system")
    with pytest.raises(UserError, match=r"data\.root=.*empty: train-images-idx3-ubyte\.gz is not in"):
        open_source(DataConfig(root=str(tmp_path / "empty")), "train")


@pytest.mark.parametrize("found, words", [("train/cat", "folder of photos.*image_folder"), ("pack.json", "packed")])
def test_data_of_another_kind_is_named(found, words, tmp_path):
    (tmp_path / found).mkdir(parents=True) if "/" in found else (tmp_path / found).write_text("{}")
    with pytest.raises(UserError, match=rf"train-images-idx3-ubyte.gz is not in(.|\n)*{words}"):
        open_source(DataConfig(root=str(tmp_path)), "train")


def test_fetched_once_into_the_cache(tmp_path, monkeypatch, capsys):
    serve(monkeypatch, published)
    assert len(open_source(DataConfig(), "test")) == COUNT
    assert "downloaded from https://" in capsys.readouterr().err
    cache = tmp_path / "cache/jepax/fashion-mnist"
    assert sorted(path.name for path in cache.iterdir()) == sorted(f"{name}.gz" for name in FILES)
    serve(monkeypatch, lambda name: refuse())
    assert len(open_source(DataConfig(), "validation")) == 2
    assert capsys.readouterr().err == ""


def test_a_damaged_cache_is_reported_and_fetched_again(tmp_path, monkeypatch, capsys):
    cache = tmp_path / "cache/jepax/fashion-mnist"
    write(cache)
    (cache / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"other"))
    serve(monkeypatch, published)
    assert len(open_source(DataConfig(), "test")) == COUNT
    assert "is not the published t10k-images-idx3-ubyte" in capsys.readouterr().err


@pytest.mark.parametrize("length", [20, 20_000])
def test_other_content_is_never_kept(tmp_path, monkeypatch, length):
    serve(monkeypatch, lambda name: b"<html>not found</html>" * length)
    with pytest.raises(UserError, match=r"(?s)downloading them failed.*is not the published"):
        open_source(DataConfig(), "train")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_when_nothing_helps_the_error_names_the_ways_out():
    with pytest.raises(UserError, match=r"https://.*: no route") as caught:
        open_source(DataConfig(), "train")
    text = str(caught.value)
    assert text.startswith("data.dataset=fashion_mnist") and len(text.splitlines()) <= 5
    assert "data.root" in text and "dataset-fashion-mnist" in text
