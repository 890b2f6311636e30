"""Pictures are scored as they are seen, or refused by name."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flowbench.errors import RunError
from flowbench.evaluation.images import _pixels
from flowbench.reading.pictures import PictureError, picture_size, read_picture, read_pixels
from flowbench.scoring.remote import FormatError, unpack

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (6, 4, 3), dtype=np.uint8)
GREY = RNG.integers(0, 256, (6, 4), dtype=np.uint8)


def png(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def exif(orientation: int) -> Image.Exif:
    found = Image.Exif()
    found[0x0112] = orientation
    return found


def with_alpha(alpha: int) -> Image.Image:
    image = Image.fromarray(RGB).convert("RGBA")
    image.putalpha(alpha)
    return image


def test_plain_pixels_are_those_of_the_file_to_the_last_bit():
    assert np.array_equal(read_picture(png(Image.fromarray(RGB))), RGB.astype(np.float32) / 255)
    assert np.array_equal(read_pixels(png(Image.fromarray(RGB))), RGB)
    assert picture_size(png(Image.fromarray(RGB))) == (4, 6)


GREY_OF = np.repeat(GREY[..., None], 3, axis=2) / 255.0
PALETTE = Image.fromarray(RGB).convert("P", palette=Image.Palette.ADAPTIVE, colors=256)
CLEAR_PALETTE = Image.fromarray(np.zeros((6, 4), np.uint8), mode="P")
CLEAR_PALETTE.putpalette([10, 20, 30])


@pytest.mark.parametrize(
    ("encoded", "seen"),
    [
        (png(with_alpha(0)), np.ones((6, 4, 3))),
        (png(with_alpha(255)), RGB / 255),
        (png(with_alpha(51)), 0.2 * RGB / 255 + 0.8),
        (png(with_alpha(0), "WEBP", lossless=True, exact=True), np.ones((6, 4, 3))),
        (png(Image.fromarray(GREY)), GREY_OF),
        (png(Image.fromarray(GREY).convert("LA")), GREY_OF),
        (png(Image.fromarray(GREY.astype(np.uint16) * 257)), GREY_OF),
        (png(Image.fromarray(GREY.astype(np.uint16) * 257), "TIFF"), GREY_OF),
        (png(Image.fromarray(GREY > 127)), np.repeat((GREY > 127)[..., None], 3, axis=2) * 1.0),
        (png(PALETTE), np.asarray(PALETTE.convert("RGB")) / 255),
        (png(CLEAR_PALETTE, transparency=0), np.ones((6, 4, 3))),
        (png(Image.fromarray(np.full((6, 4, 3), 7, np.uint8)), transparency=(7, 7, 7)), np.ones((6, 4, 3))),
        (png(Image.fromarray(RGB), exif=exif(3)), RGB[::-1, ::-1] / 255),
        (png(Image.fromarray(RGB), exif=exif(6)), np.rot90(RGB, -1) / 255),
        (png(Image.fromarray(RGB), "TIFF", exif=exif(8)), np.rot90(RGB) / 255),
        (png(Image.fromarray(RGB), "BMP"), RGB / 255),
    ],
    ids=[
        *("clear", "opaque", "glass", "webp", "grey", "grey-alpha", "16 bit", "16 bit tiff", "1 bit", "palette"),
        *("clear palette", "clear colour", "upside down", "turned", "turned tiff", "bmp"),
    ],
)
def test_a_picture_is_read_as_it_is_seen(encoded: bytes, seen: np.ndarray, tmp_path: Path):
    read = read_picture(encoded)
    assert read.dtype == np.float32
    assert np.abs(read - seen).max() < 1e-6
    assert picture_size(encoded) == (seen.shape[1], seen.shape[0])
    (tmp_path / "a.png").write_bytes(encoded)
    assert np.array_equal(_pixels(tmp_path / "a.png").permute(1, 2, 0).numpy(), read)


WHOLE = png(Image.fromarray(RGB))
FLIPPED = bytearray(WHOLE)
FLIPPED[WHOLE.index(b"IDAT") + 8] ^= 1


@pytest.mark.parametrize(
    ("encoded", "complaint"),
    [
        (b"", "is none of PNG, JPEG"),
        (b"not an image", "is none of PNG, JPEG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n", "is none of PNG, JPEG"),
        (WHOLE[:-20], "cannot be read as an image: "),
        (WHOLE[:-12], "cannot be read as an image: "),
        (bytes(FLIPPED), "cannot be read as an image: "),
        (png(Image.fromarray(RGB), "JPEG")[:-30], "cannot be read as an image: image file is truncated"),
        (png(Image.fromarray(GREY.astype(np.float32)), "TIFF"), "mode 'F'; convert it to RGB with 8 bits"),
        (png(Image.fromarray(GREY.astype(np.int32)), "TIFF"), "mode 'I'"),
        (png(Image.fromarray(RGB).convert("CMYK"), "JPEG"), "mode 'CMYK'"),
        (png(Image.fromarray(RGB), "GIF", save_all=True, append_images=[Image.fromarray(255 - RGB)]), "has 2 frames"),
        (png(Image.new("1", (9000, 9000))), "has 9000 x 9000 pixels, more than 67108864; make it smaller"),
    ],
    ids=["empty", "text", "eps", "cut", "no end", "flipped bit", "cut jpeg", "float", "int", "cmyk", "frames", "large"],
)
def test_what_cannot_be_seen_as_it_is_is_refused_by_name(encoded: bytes, complaint: str, tmp_path: Path):
    with pytest.raises(PictureError) as raised:
        read_picture(encoded)
    assert complaint in str(raised.value)
    assert "\n" not in str(raised.value)
    (tmp_path / "a.png").write_bytes(encoded)
    with pytest.raises(RunError, match=r"a\.png'"):
        _pixels(tmp_path / "a.png")


def test_a_server_reads_pictures_by_the_same_reader():
    def sent(data: bytes) -> bytes:
        text = base64.b64encode(data).decode()
        return f'{{"format": "png", "images": ["{text}"], "prompts": ["a"]}}'.encode()

    images, _ = unpack(sent(png(with_alpha(0))))
    assert images.min() == 1
    for data in (png(Image.fromarray(RGB), "JPEG"), WHOLE[:-12]):
        with pytest.raises(FormatError, match="image 0 is not a PNG file"):
            unpack(sent(data))
