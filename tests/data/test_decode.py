"""Any file becomes an upright uint8 picture; Pillow is the judge."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
import skimage
from PIL import Image, ImageOps

from jepax.data.decode import decode, decode_to_fit, downscale, read_image
from jepax.data.sources import CorruptExampleError

PHOTOS = [Path(skimage.__path__[0], "data", name) for name in ("rocket.jpg", "coffee.png", "chelsea.png")]
HOLDS = {
    "JPEG": "1 L RGB CMYK YCbCr",
    "PNG": "1 L P RGB",
    "BMP": "1 L P RGB",
    "GIF": "1 L P RGB",
    "TIFF": "1 L P RGB CMYK YCbCr",
    "WEBP": "1 L P RGB",
}
GENERATOR = np.random.default_rng(0)


def noise(height=6, width=9, channels=3, dtype=np.uint8):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return GENERATOR.integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)


def save(image: Image.Image, format: str, **settings) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **settings)
    return file.getvalue()


def reopened(data: bytes) -> Image.Image:
    return ImageOps.exif_transpose(Image.open(io.BytesIO(data)))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "settings", [{}, {"subsampling": 0}, {"subsampling": 1, "progressive": True}, {"quality": 30}], ids=str
)
@pytest.mark.parametrize("photo", PHOTOS, ids=lambda path: path.name)
def test_jpeg_equals_pillow_bit_for_bit(photo, settings, channels):
    data = save(Image.open(photo).convert("RGB").crop((0, 0, 201, 150)), "JPEG", **settings)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("L" if channels == 1 else "RGB"))
    np.testing.assert_array_equal(decode(data, channels).squeeze(), expected)


@pytest.mark.parametrize("suffix", [".heic", ".avif", ".jxl"])
@pytest.mark.parametrize("channels", [1, 3])
def test_formats_of_the_extra(suffix, channels, tmp_path):
    """Files of these formats, opened by their content, whatever their name."""
    pixels = np.asarray(Image.open(PHOTOS[0]).convert("RGB").crop((0, 0, 64, 48)))
    Image.fromarray(pixels).save(tmp_path / f"a{suffix}", quality=95)
    (tmp_path / f"a{suffix}").rename(tmp_path / "a.jpg")
    image = read_image(tmp_path / "a.jpg", (64, 64, channels))
    expected = np.asarray(Image.fromarray(pixels).convert("L" if channels == 1 else "RGB")).reshape(image.shape)
    assert np.abs(image.astype(int) - expected).mean() < 4


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("format, mode", [(format, mode) for format, modes in HOLDS.items() for mode in modes.split()])
def test_modes_and_formats(format, mode, channels):
    data = save(Image.fromarray(noise()).convert(mode), format)
    expected = np.asarray(reopened(data).convert("RGB").convert("L" if channels == 1 else "RGB"))
    assert decode(data, channels).shape == (6, 9, channels)
    np.testing.assert_array_equal(decode(data, channels).squeeze(), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied_once(format, orientation):
    image = Image.fromarray(np.kron(noise(3, 2), np.ones((8, 8, 1), np.uint8)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    settings = {"lossless": True} if format == "WEBP" else {}
    plain, turned = save(image, format, **settings), save(image, format, exif=exif, **settings)
    turn = [None, None, 0, 3, 1, 5, 4, 6, 2][orientation]  # Pillow's Transpose members, by EXIF number
    upright = Image.fromarray(decode(plain, 3))
    expected = upright if turn is None else upright.transpose(Image.Transpose(turn))
    np.testing.assert_array_equal(decode(turned, 3), np.asarray(expected))


def test_transparency_is_laid_on_white():
    half = np.full((2, 2, 4), (200, 100, 0, 128), np.uint8)
    np.testing.assert_allclose(decode(save(Image.fromarray(half), "PNG"), 3)[0, 0], [227, 177, 127], atol=1)
    half[..., 3] = 0
    assert (decode(save(Image.fromarray(half), "PNG"), 3) == 255).all()
    assert (decode(save(Image.fromarray(half[..., 2:]), "PNG"), 1) == 255).all()


@pytest.mark.parametrize("transparency", [1, b"\x80\x00"])
def test_palette_with_transparency(transparency):
    image = Image.fromarray(np.array([[0, 1], [0, 1]], np.uint8)).convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60])
    pixels = decode(save(image, "PNG", transparency=transparency), 3)
    assert pixels[0, 1].tolist() == [255, 255, 255]
    first = [10, 20, 30] if transparency == 1 else [132, 137, 142]
    np.testing.assert_allclose(pixels[0, 0], first, atol=1)


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bit_grey_keeps_its_high_byte(format):
    deep = noise(5, 7, 1, np.uint16)
    pixels = decode(save(Image.fromarray(deep), format), 3)
    np.testing.assert_array_equal(pixels, np.repeat((deep >> 8)[..., None], 3, axis=2))


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_without_a_known_range_are_refused(mode):
    data = save(Image.fromarray(noise(channels=1)).convert(mode), "TIFF")
    with pytest.raises(ValueError, match=f"mode {mode}.*no known range"):
        decode(data, 3)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_a_side_of_one_pixel_is_refused_and_of_two_is_read(format, channels):
    for size in ((1, 1), (1, 40), (40, 1)):
        with pytest.raises(ValueError, match=rf"{size[0]} x {size[1]} pixels are no image"):
            decode(save(Image.new("L", size, 7), format), channels)
    assert decode(save(Image.new("L", (2, 2), 7), format), channels).tolist() == [[[7] * channels] * 2] * 2


@pytest.mark.parametrize(
    "height, width, expected", [(40, 20, (16, 8)), (20, 40, (8, 16)), (3, 400, (1, 16)), (17, 17, (16, 16))]
)
@pytest.mark.parametrize("channels", [1, 3])
def test_larger_pictures_are_scaled_down(height, width, expected, channels):
    pixels = noise(height, width, channels)
    small = downscale(pixels.reshape(height, width, channels), 16, 16)
    assert small.shape == (*expected, channels)
    np.testing.assert_array_equal(
        small.squeeze(), np.asarray(Image.fromarray(pixels).resize(expected[::-1], Image.Resampling.BICUBIC)).squeeze()
    )


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "height, width, room, expected",
    [
        (152, 200, 200, (152, 200)),
        (152, 200, 199, (133, 175)),
        (152, 200, 80, (57, 75)),
        (200, 152, 100, (100, 76)),
        (152, 200, 20, (15, 20)),  # an eighth is 19 x 25: scaled once more
    ],
)
@pytest.mark.parametrize("photo", PHOTOS, ids=lambda path: path.name)
def test_larger_jpegs_are_decoded_by_eighths(photo, height, width, room, expected, channels):
    """To what antialiased scaling of the whole picture gives, in place and in value."""
    data = save(Image.open(photo).convert("RGB").crop((0, 0, width, height)), "JPEG")
    small = decode_to_fit(data, room, room, channels)
    assert small.shape == (*expected, channels)
    whole = Image.open(io.BytesIO(data)).convert("L" if channels == 1 else "RGB")
    scaled = np.asarray(whole.resize(expected[::-1], Image.Resampling.BICUBIC), np.float32)
    difference = np.abs(small.squeeze() - scaled).mean()
    shifted = np.abs(small.squeeze()[1:] - scaled[:-1]).mean()
    assert difference < 2 and difference < shifted / 2


def test_a_file_keeps_its_size_or_is_scaled_to_the_canvas(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", (16, 16, 3)), pixels)
    assert read_image(tmp_path / "a.png", (3, 16, 1)).shape == (3, 4, 1)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no picture",
        save(Image.fromarray(noise(64, 64)), "JPEG")[:900],
        save(Image.fromarray(noise()), "PNG")[:60],
    ],
)
def test_broken_files_are_named(tmp_path, content):
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    with pytest.raises(CorruptExampleError, match=r"a\.jpg cannot be read as an image: "):
        read_image(path, (16, 16, 3))


def test_pipes_and_endless_files_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "a.jpg")
    with pytest.raises(CorruptExampleError, match="it is no regular file"):
        read_image(tmp_path / "a.jpg", (16, 16, 3))
    with (tmp_path / "b.jpg").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(CorruptExampleError, match=r"its 1099511627776 bytes are over the limit"):
        read_image(tmp_path / "b.jpg", (16, 16, 3))


def test_other_formats_are_not_opened(tmp_path):
    (tmp_path / "a.jpg").write_bytes(save(Image.fromarray(noise()), "EPS"))
    with pytest.raises(CorruptExampleError):
        read_image(tmp_path / "a.jpg", (16, 16, 3))


@pytest.mark.parametrize("limit", [20, 40])
def test_decompression_bombs_are_refused(tmp_path, monkeypatch, limit):
    Image.fromarray(noise(6, 9)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(CorruptExampleError, match=r"a\.png"):
        read_image(tmp_path / "a.png", (16, 16, 3))


def test_jpeg_with_rubbish_behind_it_is_read():
    data = save(Image.fromarray(noise()), "JPEG")
    np.testing.assert_array_equal(decode(data + b"rubbish", 3), decode(data, 3))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # as the module itself has it, outside of pytest
def test_damaged_exif_counts_as_none():
    data = save(Image.fromarray(noise()), "JPEG")
    exif = b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01"
    torn = data[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + data[2:]
    np.testing.assert_array_equal(decode(torn, 3), decode(data, 3))


def test_jpeg_whose_scan_is_interrupted_by_rubbish_is_left_to_pillow():
    data = save(Image.fromarray(noise(64, 64)), "JPEG")
    scan = data.index(b"\xff\xda") + 60
    torn = data[:scan] + b"\xff\xd5" + data[scan:]
    np.testing.assert_array_equal(decode(torn, 3), np.asarray(Image.open(io.BytesIO(torn))))
