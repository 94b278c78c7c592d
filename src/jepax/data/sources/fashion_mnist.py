"""Fashion-MNIST (Xiao, Rasul, Vollgraf 2017, arXiv:1708.07747): 60,000 + 10,000 grey pictures of clothes, 28 x 28.

Read from a folder, the system, or the user's cache; fetched into the cache where none has it. Every file is checked
against the sha256 of its content before use.
"""

import gzip
import hashlib
import http.client
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
from jaxtyping import UInt8

from jepax.data.sources import ArraySource, Split, rows_of
from jepax.types import UserError

NAMES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
DIGESTS = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
"""sha256 of each idx file, decompressed: recompressing a file does not make it another."""
SIZES = {
    "train-images-idx3-ubyte": 16 + 60_000 * 784,
    "train-labels-idx1-ubyte": 8 + 60_000,
    "t10k-images-idx3-ubyte": 16 + 10_000 * 784,
    "t10k-labels-idx1-ubyte": 8 + 10_000,
}
"""Bytes of each idx file, decompressed: what would grow beyond that is not read to its end."""
SYSTEM = Path("/usr/share/datasets/fashion-mnist")
PACKAGE = "dataset-fashion-mnist"
HOSTS = (
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
)
PATIENCE = 10
"""Seconds without an answer after which a host is given up."""


class Damaged(Exception):
    """A file whose content is not the published one."""


def open_split(root: str | None, split: Split, validation: float, channels: int) -> ArraySource:
    """The split's pictures in memory (47 MB for train), grey or, with `channels=3`, the grey level three times.

    Errors: UserError where `root` lacks the files or holds others, or where nothing is found nor fetched.
    """
    part = "t10k" if split == "test" else "train"
    images, labels = _find(root, [f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte"])
    labels = np.frombuffer(labels, np.uint8, offset=8).astype(np.int32)
    pictures = np.frombuffer(images, np.uint8, offset=16).reshape(len(labels), 28, 28, 1)
    rows = rows_of(split, labels, validation)
    return ArraySource((28, 28, channels), NAMES, labels[rows], _with_channels(pictures[rows], channels))


def cache_folder() -> Path:
    """Where fetched files are kept: $XDG_CACHE_HOME (or ~/.cache)/jepax/fashion-mnist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jepax" / "fashion-mnist"


def _with_channels(pictures: UInt8[np.ndarray, "examples 28 28 1"], channels: int) -> UInt8[np.ndarray, "_ 28 28 _"]:
    return np.ascontiguousarray(np.broadcast_to(pictures, (*pictures.shape[:3], channels)))


def _find(root: str | None, names: list[str]) -> list[bytes]:
    """Contents of the files, from the first place that has them all unharmed."""
    if root is not None:
        return _read_root(Path(root).expanduser(), names)
    cache = cache_folder()
    for folder in (SYSTEM, cache):
        try:
            return [_read(folder, name) for name in names]
        except OSError:
            continue
        except Damaged as error:
            _say(f"{error}; {'fetching it again' if folder == cache else 'passed over'}.")
    _fetch(cache)
    return [_read(cache, name) for name in names]


def _read_root(folder: Path, names: list[str]) -> list[bytes]:
    try:
        return [_read(folder, name) for name in names]
    except (OSError, Damaged) as error:
        raise UserError(
            f"data.root={folder}: {error}.\n"
            "It must hold Fashion-MNIST's four idx files, plain or .gz; without data.root they are found or fetched."
        ) from error


def _read(folder: Path, name: str) -> bytes:
    """The file's content, decompressed and verified. Errors: FileNotFoundError, Damaged."""
    for path in (folder / f"{name}.gz", folder / name):
        if path.is_file():
            with path.open("rb") as file:
                return _verified(file, name, path)
    raise FileNotFoundError(f"{name}.gz is not in {folder}")


def _verified(file: BinaryIO, name: str, origin: Path) -> bytes:
    packed = file.read(2) == b"\x1f\x8b"
    file.seek(0)
    try:
        content = (gzip.GzipFile(fileobj=file) if packed else file).read(SIZES[name] + 1)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise Damaged(f"{origin} is damaged ({error})") from error
    if len(content) > SIZES[name]:
        raise Damaged(f"{origin} is not the published {name} (longer than its {SIZES[name]} bytes)")
    digest = hashlib.sha256(content).hexdigest()
    if digest != DIGESTS[name]:
        raise Damaged(f"{origin} is not the published {name} (sha256 {digest[:16]}, should be {DIGESTS[name][:16]})")
    return content


def _say(text: str) -> None:
    print(f"jepax: Fashion-MNIST: {text}", file=sys.stderr)


def _fetch(cache: Path) -> None:
    """Fills the cache from the first fetcher that delivers all four files unharmed."""
    tried = []
    for origin, fetcher in FETCHERS.items():
        try:
            with tempfile.TemporaryDirectory(prefix="jepax-") as temporary:
                fetcher(Path(temporary))
                for name in DIGESTS:
                    _read(Path(temporary), name)
                _keep(Path(temporary), cache)
        except (OSError, http.client.HTTPException, Damaged, subprocess.SubprocessError) as error:
            tried.append(f"{origin}: {_reason(error)}")
        else:
            return _say(f"fetched from {origin} into {cache}.")
    raise UserError(
        f"data.source=fashion_mnist: its files are not in {SYSTEM} nor in {cache}, and fetching them failed:\n"
        + "; ".join(tried)
        + f".\nInstall the Debian package {PACKAGE}, or put {', '.join(f'{name}.gz' for name in DIGESTS)} "
        "in a folder and set data.root to it."
    )


def _keep(found: Path, cache: Path) -> None:
    """Moves files into the cache so that a reader sees each of them whole or not at all."""
    cache.mkdir(parents=True, exist_ok=True)
    for name in DIGESTS:
        partial = cache / f".{name}.{os.getpid()}.partial"
        try:
            shutil.copyfile(found / f"{name}.gz", partial)
            os.replace(partial, cache / f"{name}.gz")
        finally:
            partial.unlink(missing_ok=True)


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        lines = (error.stderr or "").strip().splitlines()
        return lines[-1] if lines else f"exit code {error.returncode}"
    return " ".join(str(error).split()) or type(error).__name__


def _download(host: str, folder: Path) -> None:
    for name in DIGESTS:
        with urllib.request.urlopen(f"{host}{name}.gz", timeout=PATIENCE) as answer:
            (folder / f"{name}.gz").write_bytes(answer.read(SIZES[name]))  # a longer answer is another file


def _unpack_package(folder: Path) -> None:
    """Debian's package, downloaded and unpacked beside the system: nothing is installed and no root is needed."""
    if not (shutil.which("apt-get") and shutil.which("dpkg")):
        raise FileNotFoundError("this system has no apt-get")
    own = folder / "apt"
    for part in ("lists/partial", "cache/archives/partial"):
        (own / part).mkdir(parents=True)
    private = ["-o", f"Dir::State::Lists={own / 'lists'}", "-o", f"Dir::Cache={own / 'cache'}"]
    try:
        _run(["apt-get", "download", PACKAGE], folder)
    except subprocess.CalledProcessError:  # the system's package lists are missing or old: fetch some of our own
        _run(["apt-get", *private, "update"], folder)
        _run(["apt-get", *private, "download", PACKAGE], folder)
    package = next(folder.glob(f"{PACKAGE}_*.deb"), None)
    if package is None:
        raise FileNotFoundError("apt-get downloaded no package")
    _run(["dpkg", "-x", str(package), str(folder / "unpacked")], folder)
    for file in (folder / "unpacked" / SYSTEM.relative_to("/")).iterdir():
        file.rename(folder / file.name)


def _run(command: list[str], folder: Path) -> None:
    if command[0] == "apt-get":
        patience = ["-o", f"Acquire::http::Timeout={PATIENCE}", "-o", f"Acquire::https::Timeout={PATIENCE}"]
        command = ["apt-get", "-q", "-o", "Acquire::Retries=0", *patience, *command[1:]]
    environment = {**os.environ, "LC_ALL": "C"}
    subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True, timeout=300)


FETCHERS: dict[str, Callable[[Path], None]] = {
    **{host: (lambda folder, host=host: _download(host, folder)) for host in HOSTS},
    "apt-get": _unpack_package,
}
"""Where the files can be had, in the order in which it is tried: each puts the four .gz files in the folder given."""
