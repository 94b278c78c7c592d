"""Decodes a file's bytes to an upright uint8 image, once per example whatever the number of views."""

import io
import math
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import simplejpeg
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from jepax.data.sources import CorruptExampleError

# Registers every format now. Otherwise Pillow does so at the first unusual file, in several threads at a time.
Image.init()
with suppress(ImportError):  # these and AVIF, which Pillow itself may have, come with the extra `formats`
    import pillow_heif

    pillow_heif.register_heif_opener()
with suppress(ImportError):
    import pillow_jxl  # noqa: F401

OPTIONAL_SUFFIXES = {".heic": "HEIF", ".heif": "HEIF", ".avif": "AVIF", ".jxl": "JXL"}
"""Extensions of Pillow's optional formats."""
PILLOW_FORMATS = tuple(
    name for name in ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "HEIF", "AVIF", "JXL") if name in Image.OPEN
)
"""Formats that are opened, whatever a file's name: some of Pillow's other formats start external programs."""
IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
    | {suffix for suffix, name in OPTIONAL_SUFFIXES.items() if name in PILLOW_FORMATS}
)
EXIF_ORIENTATION = 0x0112
MIN_SIDE = 2
"""Least side in pixels. A shorter one means a page's spacer, or a failed download."""
MAX_FILE_BYTES = 2**30
"""Largest file that is read: twice an uncompressed 16-bit RGB image of as many pixels as Pillow allows."""

# Some of ImageNet's photos have corrupt EXIF, which is then ignored; images over Pillow's limit are refused by
# `open_header`. The warnings name no file, and silencing them around each call is not safe with threads.
warnings.filterwarnings("ignore", "Corrupt EXIF data", UserWarning, r"PIL\.")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

Pixels = UInt8[np.ndarray, "height width channels"]


def read_image(path: Path, canvas_shape: tuple[int, int, int], bit_depth: int = 16) -> Pixels:
    """Decodes a file, scaled down to fit the canvas. Raises `CorruptExampleError`, naming path and cause."""
    with wrap_decode_errors(str(path)):
        return decode_to_fit(read_file(path), *canvas_shape, bit_depth)


@contextmanager
def wrap_decode_errors(name: str) -> Iterator[None]:
    """Converts every error to a `CorruptExampleError` that names the image: decoders raise many types, among them
    OSError, SyntaxError and struct.error."""
    try:
        yield
    except Exception as error:
        raise CorruptExampleError(
            f"{name} cannot be read as an image: {error or type(error).__name__}.\nRepair the file or remove it."
        ) from error


def read_file(path: Path) -> bytes:
    """Returns the content. Raises OSError; ValueError for a pipe or device, and for a file over `MAX_FILE_BYTES`."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # reading a pipe would block forever
        raise ValueError("it is no regular file")
    if status.st_size > MAX_FILE_BYTES:
        raise ValueError(f"its {status.st_size} bytes are over the limit of {MAX_FILE_BYTES}")
    return path.read_bytes()


def decode_to_fit(data: bytes, rows: int, columns: int, channels: int, bit_depth: int = 16) -> Pixels:
    """Decodes an image to at most rows x columns pixels, aspect kept; a smaller one keeps its size.

    A larger JPEG is decoded to as many eighths of its size as fit, which costs less than decoding all of it; scaling
    pixels afterwards costs several times as much. Other formats, and images more than eight times too large, are
    scaled by `downscale`. Raises as `decode` does.
    """
    return downscale(decode(data, channels, (rows, columns), bit_depth), rows, columns)


def decode(data: bytes, channels: int, fit: tuple[int, int] | None = None, bit_depth: int = 16) -> Pixels:
    """Decodes an image, upright by its EXIF orientation, to gray (`channels=1`) or RGB (3).

    `fit`: rows and columns to which a JPEG may be scaled down while decoding, by eighths; None: it keeps its size.

    Transparent images are blended on white, as pages and browsers show them. 16-bit gray keeps the highest 8 of its
    `bit_depth` bits, values above them 255; of 16-bit color Pillow keeps the high byte. Only an animation's first frame
    is decoded. Gray is Pillow's 0.299 R + 0.587 G + 0.114 B.

    Raises whatever the decoder raises for corrupt data; ValueError for no data, for a side below `MIN_SIDE` and for
    pixels without a known range (32-bit, float); and, before anything is decoded, Pillow's DecompressionBombWarning or
    -Error for images over `PIL.Image.MAX_IMAGE_PIXELS`.
    """
    image = open_header(data)
    pixels = _decode_jpeg_turbo(image, data, fit)
    if pixels is not None and pixels.shape[2] == channels:
        return pixels
    image = _to_rgb8(image, bit_depth) if pixels is None else _to_pillow(pixels)
    pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    return pixels.reshape(*pixels.shape[:2], channels)


def downscale(pixels: Pixels, rows: int, columns: int) -> UInt8[np.ndarray, "small_height small_width channels"]:
    """Fits an image into rows x columns pixels by antialiased bicubic scaling; smaller ones keep their size."""
    height, width, channels = pixels.shape
    scale = min(rows / height, columns / width)
    if scale >= 1:
        return pixels
    small = (min(columns, max(1, round(width * scale))), min(rows, max(1, round(height * scale))))
    image = _to_pillow(pixels).resize(small, Image.Resampling.BICUBIC)
    return np.asarray(image).reshape(small[1], small[0], channels)


def _to_pillow(pixels: Pixels) -> Image.Image:
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def open_header(data: bytes) -> Image.Image:
    """Reads the header only, and checks the size by it. Raises as `decode` does."""
    if not data:
        raise ValueError("it is empty")
    try:
        image = Image.open(io.BytesIO(data), formats=PILLOW_FORMATS)
    except UnidentifiedImageError as error:  # its own message names an object in memory
        raise ValueError(f"its content is none of {', '.join(PILLOW_FORMATS)}") from error
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:  # Pillow itself raises only at twice the limit
        raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels are over the limit of {limit}")
    if min(image.size) < MIN_SIDE:
        raise ValueError(f"{image.width} x {image.height} pixels are no image")
    return image


def _decode_jpeg_turbo(image: Image.Image, data: bytes, fit: tuple[int, int] | None) -> Pixels | None:
    """Decodes by libjpeg-turbo without Pillow's copies, bit-equal to it; returns None if Pillow must decode."""
    if image.format not in ("JPEG", "MPO") or image.mode not in ("L", "RGB"):
        return None
    if image.getexif().get(EXIF_ORIENTATION, 1) != 1:
        return None
    height, width = (image.height, image.width) if fit is None else _dct_size((image.height, image.width), fit)
    try:
        return simplejpeg.decode_jpeg(data, "GRAY" if image.mode == "L" else "RGB", min_height=height, min_width=width)
    except ValueError:
        return None


def _dct_size(size: tuple[int, int], fit: tuple[int, int]) -> tuple[int, int]:
    """Returns the largest of libjpeg's sizes, eighths rounded up, that fits; an eighth if none does."""
    for eighths in range(8, 0, -1):
        height, width = (math.ceil(side * eighths / 8) for side in size)
        if height <= fit[0] and width <= fit[1]:
            break
    return height, width


def max_value_16bit(data: bytes) -> int:
    """Returns the largest value of a 16-bit gray image, 0 for any other. Raises as `decode` does."""
    image = open_header(data)
    return int(np.asarray(image).max()) if _is_16bit(image) else 0


def _is_16bit(image: Image.Image) -> bool:
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")


def _to_rgb8(image: Image.Image, bit_depth: int) -> Image.Image:
    """Makes the image upright, opaque and 8-bit, in a mode that `convert` maps to L and RGB exactly."""
    sixteen = _is_16bit(image)
    if not sixteen and image.mode in ("I", "F"):
        raise ValueError(f"its pixels (mode {image.mode}) have no known range; save it with 8 or 16 bits")
    image = ImageOps.exif_transpose(image)
    if sixteen:
        return Image.fromarray(np.minimum(np.asarray(image).astype(np.uint32) >> (bit_depth - 8), 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB") if image.mode not in ("1", "L", "RGB") else image
