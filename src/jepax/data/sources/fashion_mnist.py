"""Fashion-MNIST (Xiao, Rasul, Vollgraf 2017, arXiv:1708.07747): 60,000 + 10,000 gray images of clothes, 28 x 28.

Read from `data.root`, or else from the system's folder or the user's cache, into which it is downloaded once. Every
file is checked against the sha256 of its content.
"""

import gzip
import hashlib
import http.client
import os
import sys
import tempfile
import urllib.request
import zlib
from pathlib import Path

import numpy as np

from jepax.data.sources import ArraySource, SplitName, split_rows
from jepax.data.sources.packed import PACK_FILE
from jepax.types import UserError

CLASS_NAMES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
FILES = {
    "train-images-idx3-ubyte": (47_040_016, "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888"),
    "train-labels-idx1-ubyte": (60_008, "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"),
    "t10k-images-idx3-ubyte": (7_840_016, "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"),
    "t10k-labels-idx1-ubyte": (10_008, "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"),
}
"""Bytes and sha256 of each idx file, decompressed: a file may be compressed in another way."""
SYSTEM_DIR = Path("/usr/share/datasets/fashion-mnist")
"""Folder of Debian's package dataset-fashion-mnist."""
URL = "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/"
TIMEOUT_S = 10


class ChecksumError(Exception):
    """A file whose content is not the published one."""


def open_split(root: Path | None, split: SplitName, validation: float, channels: int) -> ArraySource:
    """Reads the split into memory (47 MB for train), gray or, with `channels=3`, the gray level three times.

    Raises `UserError` where `root` lacks the files or has others, or where nothing is found nor downloaded.
    """
    part = "t10k" if split == "test" else "train"
    images, labels = _find_files(root, [f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte"])
    labels = np.frombuffer(labels, np.uint8, offset=8).astype(np.int32)
    images = np.frombuffer(images, np.uint8, offset=16).reshape(len(labels), 28, 28, 1)
    rows = split_rows(split, labels, validation)
    images = np.ascontiguousarray(np.broadcast_to(images[rows], (len(rows), 28, 28, channels)))
    return ArraySource((28, 28, channels), CLASS_NAMES, labels[rows], images)


def cache_dir() -> Path:
    """Returns $XDG_CACHE_HOME (or ~/.cache)/jepax/fashion-mnist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jepax" / "fashion-mnist"


def _find_files(root: Path | None, names: list[str]) -> list[bytes]:
    """Returns the files' contents from the first place that has them all unharmed."""
    if root is not None:
        try:
            return [_read_file(root, name) for name in names]
        except (OSError, ChecksumError) as error:
            needed = "It must hold Fashion-MNIST's four idx files, plain or .gz; without data.root they are downloaded."
            if (root / "train").is_dir():
                needed = "It looks like a folder of photos, train/CLASS/*.jpg: --data.dataset image_folder"
            elif (root / PACK_FILE).is_file():
                needed = "It looks like a pack: --data.dataset packed"
            raise UserError(f"data.root={root}: {error}.\n{needed}") from error
    cache = cache_dir()
    for folder in (SYSTEM_DIR, cache):
        try:
            return [_read_file(folder, name) for name in names]
        except OSError:
            continue
        except ChecksumError as error:
            _print(f"{error}; {'downloading it again' if folder == cache else 'not used'}.")
    _download(cache)
    return [_read_file(cache, name) for name in names]


def _read_file(folder: Path, name: str) -> bytes:
    """Returns the file's content, decompressed and verified. Raises FileNotFoundError and `ChecksumError`."""
    path = next((path for path in (folder / f"{name}.gz", folder / name) if path.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{name}.gz is not in {folder}")
    size, sha256 = FILES[name]
    with path.open("rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        try:
            content = (gzip.GzipFile(fileobj=file) if compressed else file).read(
                size + 1
            )  # no more is read of any file
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ChecksumError(f"{path} is corrupt ({error})") from error
    if len(content) > size:
        raise ChecksumError(f"{path} is not the published {name} (longer than its {size} bytes)")
    if (digest := hashlib.sha256(content).hexdigest()) != sha256:
        raise ChecksumError(f"{path} is not the published {name} (sha256 {digest[:16]}, not {sha256[:16]})")
    return content


def _print(text: str) -> None:
    print(f"jepax: Fashion-MNIST: {text}", file=sys.stderr)


def _download(cache: Path) -> None:
    """Fills the cache. Raises `UserError` where a file cannot be downloaded, or is not the published one."""
    cache.mkdir(parents=True, exist_ok=True)
    # In the cache's own file system: each file is renamed, so that no reader sees half of it.
    with tempfile.TemporaryDirectory(prefix=".download-", dir=cache) as folder:
        try:
            for name, (size, _) in FILES.items():
                path = Path(folder) / f"{name}.gz"
                with urllib.request.urlopen(f"{URL}{path.name}", timeout=TIMEOUT_S) as answer:
                    path.write_bytes(answer.read(size + 1000))  # a longer answer is another file
                _read_file(path.parent, name)
                path.replace(cache / path.name)
        except (OSError, http.client.HTTPException, ChecksumError) as error:
            reason = str(error).strip() or type(error).__name__
            raise UserError(
                f"data.dataset=fashion_mnist: its files are not in {SYSTEM_DIR} nor in {cache}, and downloading them"
                f" failed:\n{URL}: {reason.splitlines()[-1]}.\n"
                f"Install Debian's package dataset-fashion-mnist, or put {', '.join(f'{name}.gz' for name in FILES)} "
                "in a folder and set data.root to it."
            ) from error
    _print(f"downloaded from {URL} into {cache}.")
