"""From a file's bytes to an upright uint8 picture on a canvas, once per example whatever the views."""

import io
import math
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

import numpy as np
import simplejpeg
from jaxtyping import Int32, UInt8

# Importing a plugin registers it: left to itself Pillow does that at the first odd file, in several threads at once.
from PIL import (
    BmpImagePlugin,  # noqa: F401
    GifImagePlugin,  # noqa: F401
    Image,
    ImageOps,
    JpegImagePlugin,  # noqa: F401
    PngImagePlugin,  # noqa: F401
    TiffImagePlugin,  # noqa: F401
    UnidentifiedImageError,
    WebPImagePlugin,  # noqa: F401
)

from jepax.types import UserError

SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
"""Nothing else is opened, whatever a file calls itself: some of Pillow's other formats start external programs."""
ORIENTATION = 0x0112
LEAST_SIDE = 2
"""Pixels. A picture with a shorter side shows nothing: a page's spacer, or what an empty download was turned into."""
MOST_BYTES = 2**30
"""Twice an uncompressed 16-bit RGB picture of as many pixels as Pillow allows; a larger file is not read at all."""

# Some of ImageNet's photos have damaged EXIF, which is then as good as none. The warning names no file, and silencing
# it around each call is not safe with threads.
warnings.filterwarnings("ignore", "Corrupt EXIF data", UserWarning, r"PIL\.")


class BrokenImage(UserError):
    """A file that cannot be read as a picture; the message names it, and its cause is in `__cause__`."""


def read_onto_canvas(
    path: str | PathLike[str], canvas: UInt8[np.ndarray, "rows columns channels"]
) -> Int32[np.ndarray, "2"]:
    """Decodes `path` into the top left corner of `canvas` (zeros beforehand) and returns its height and width there.

    A picture larger than the canvas is scaled down by `fitted`. Errors: BrokenImage, naming the path and the cause.
    """
    with blamed(str(path)):
        return onto_canvas(bytes_of(Path(path)), canvas)


def onto_canvas(data: bytes, canvas: UInt8[np.ndarray, "rows columns channels"]) -> Int32[np.ndarray, "2"]:
    """The same of a file's content. Errors: those of `decode`."""
    rows, columns, channels = canvas.shape
    picture = fitted(data, rows, columns, channels)
    height, width = picture.shape[:2]
    canvas[:height, :width] = picture
    return np.array([height, width], np.int32)


@contextmanager
def blamed(name: str) -> Iterator[None]:
    """Within, every error is a BrokenImage that names the picture: decoders raise all sorts, from OSError to
    SyntaxError and struct.error."""
    try:
        yield
    except Exception as error:
        raise BrokenImage(
            f"{name} cannot be read as a picture: {error or type(error).__name__}.\nRepair the file or remove it."
        ) from error


def fitted(data: bytes, rows: int, columns: int, channels: int) -> UInt8[np.ndarray, "height width channels"]:
    """The picture within rows x columns pixels, aspect kept; one that is no larger is left as it is.

    A larger JPEG is decoded to as many eighths of its size as fit, which costs less than to decode it whole; to scale
    pixels afterwards costs several times as much. Anything else, and what is more than eight times too large, is
    scaled by `shrink`. Errors: those of `decode`.
    """
    return shrink(decode(data, channels, (rows, columns)), rows, columns)


def decode(
    data: bytes, channels: int, room: tuple[int, int] | None = None
) -> UInt8[np.ndarray, "height width channels"]:
    """The picture, upright as its EXIF orientation says, in grey (`channels=1`) or RGB (3).

    `room`: rows and columns into which a JPEG may be scaled down on the way, by eighths; None: it keeps its size.

    Transparent pictures are laid on white, as pages and browsers show them. 16-bit grey keeps its high byte, as Pillow
    does for 16-bit colour. Of an animation the first frame counts. Grey is Pillow's 0.299 R + 0.587 G + 0.114 B.

    Errors: whatever the decoder raises for broken data; ValueError for no data, for a side below `LEAST_SIDE` and for
    pixels without a known range (32-bit, float); and, before anything is decoded, Pillow's DecompressionBombWarning or
    -Error for pictures over `PIL.Image.MAX_IMAGE_PIXELS`.
    """
    image = _open(data)
    picture = _fast_jpeg(image, data, room)
    if picture is not None and picture.shape[2] == channels:
        return picture
    image = _plain(image) if picture is None else _image(picture)
    pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    return pixels.reshape(*pixels.shape[:2], channels)


def shrink(
    picture: UInt8[np.ndarray, "height width channels"], rows: int, columns: int
) -> UInt8[np.ndarray, "small_height small_width channels"]:
    """Fits the picture into rows x columns pixels by antialiased bicubic scaling; smaller ones are left as they are."""
    height, width, channels = picture.shape
    scale = min(rows / height, columns / width)
    if scale >= 1:
        return picture
    small = (min(columns, max(1, round(width * scale))), min(rows, max(1, round(height * scale))))
    image = _image(picture).resize(small, Image.Resampling.BICUBIC)
    return np.asarray(image).reshape(small[1], small[0], channels)


def _image(picture: UInt8[np.ndarray, "height width channels"]) -> Image.Image:
    return Image.fromarray(picture[..., 0] if picture.shape[2] == 1 else picture)


def bytes_of(path: Path) -> bytes:
    """The file's content. Errors: OSError; ValueError for a pipe or device, and for a file over `MOST_BYTES`."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for, for ever
        raise ValueError("it is no regular file")
    if status.st_size > MOST_BYTES:
        raise ValueError(f"its {status.st_size} bytes are over the limit of {MOST_BYTES}")
    return path.read_bytes()


def longer_side(data: bytes) -> int:
    """In pixels, as its header says. Errors: those of `decode`."""
    return max(_open(data).size)


def is_grey(data: bytes) -> bool:
    """Whether its header says that the picture has no colours. Errors: those of `decode`."""
    image = _open(data)
    return image.mode in ("1", "L") or image.mode.startswith("I")


def _open(data: bytes) -> Image.Image:
    """Reads the header only, and judges the picture's size by it."""
    if not data:
        raise ValueError("it is empty")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:  # whose own message names an object in memory
        raise ValueError(f"its content is none of {', '.join(FORMATS)}") from error
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:  # Pillow itself raises only at twice the limit
        raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels are over the limit of {limit}")
    if min(image.size) < LEAST_SIDE:
        raise ValueError(f"{image.width} x {image.height} pixels are no picture")
    return image


def _fast_jpeg(
    image: Image.Image, data: bytes, room: tuple[int, int] | None
) -> UInt8[np.ndarray, "height width channels"] | None:
    """libjpeg-turbo without Pillow's copies, bit-equal to it; None where Pillow has to do it or to judge the damage."""
    if image.format not in ("JPEG", "MPO") or image.mode not in ("L", "RGB"):
        return None
    if image.getexif().get(ORIENTATION, 1) != 1:
        return None
    height, width = (image.height, image.width) if room is None else _eighths((image.height, image.width), room)
    try:
        return simplejpeg.decode_jpeg(data, "GRAY" if image.mode == "L" else "RGB", min_height=height, min_width=width)
    except ValueError:
        return None


def _eighths(size: tuple[int, int], room: tuple[int, int]) -> tuple[int, int]:
    """The largest of libjpeg's sizes, eighths rounded up, that the room holds; an eighth where it holds none."""
    for eighths in range(8, 0, -1):
        height, width = (math.ceil(side * eighths / 8) for side in size)
        if height <= room[0] and width <= room[1]:
            break
    return height, width


def _plain(image: Image.Image) -> Image.Image:
    """Upright, opaque, eight bits a channel; any mode that `convert` takes to L and RGB faithfully."""
    sixteen = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")
    if not sixteen and image.mode in ("I", "F"):
        raise ValueError(f"its pixels (mode {image.mode}) have no known range; save it with 8 or 16 bits")
    image = ImageOps.exif_transpose(image)
    if sixteen:
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB") if image.mode not in ("1", "L", "RGB") else image
