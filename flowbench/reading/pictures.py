"""Pictures as they are seen: turned as EXIF says, on white where they are transparent, 16 bits scaled."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from PIL import Image

Encoded: TypeAlias = Path | bytes

# Others are refused: some are read by programs outside, as EPS is, or hold no picture of plain colours.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
MAX_PIXELS = 2**26  # 8192 x 8192; a file of a few kilobytes can claim gigabytes
PLAIN = ("1", "L", "P", "RGB")
TRANSPARENT = ("LA", "PA", "RGBA", "La", "RGBa")
DEEP = ("I;16", "I;16L", "I;16B", "I;16N")  # grey with 16 bits
TURNED = (5, 6, 7, 8)  # values of EXIF's orientation that swap width and height
ORIENTATION = 0x0112


class PictureError(ValueError):
    """A file is no picture to be scored; the message goes on where the file's name ends ("is truncated")."""


def picture_size(source: Encoded, formats: Sequence[str] = FORMATS, most: int = MAX_PIXELS) -> tuple[int, int]:
    """(width, height) of a picture as `read_picture` returns it; its pixels are not read.

    Raises PictureError as `read_picture` does, as far as that can be told from the beginning of a file.
    """
    with _opened(source, formats, most) as image:
        width, height = image.size
        # Of a TIFF, Pillow's size is that of the turned picture.
        turned = image.format != "TIFF" and image.getexif().get(ORIENTATION) in TURNED
        return (height, width) if turned else (width, height)


def read_picture(source: Encoded, formats: Sequence[str] = FORMATS, most: int = MAX_PIXELS) -> np.ndarray:
    """The pixels of an encoded picture, (H, W, 3) float32 in [0, 1], as sRGB.

    Turned as EXIF's orientation says; transparent pixels on white; palettes and grey become colours, 16-bit grey is
    scaled. formats: names of Pillow's formats; most: pixels that it may have.
    Raises PictureError for a file that is truncated, damaged or of another format, too many pixels, several frames, and
    pixels that are floats, 32-bit integers, or of another colour space than RGB.
    """
    from PIL import ImageOps

    with _opened(source, formats, most) as image:
        if image.format == "PNG":
            _check_png(source)
        image.load()
        # The picture itself has no orientation any more, and keeps its mode.
        return _on_white(ImageOps.exif_transpose(image))


def read_pixels(source: Encoded) -> np.ndarray:
    """As `read_picture`, rounded to (H, W, 3) uint8."""
    return (read_picture(source) * 255).round().astype(np.uint8)


@contextmanager
def _opened(source: Encoded, formats: Sequence[str], most: int) -> Iterator[Image.Image]:
    """An opened picture of a kind that can be read; what goes wrong with it is said as a PictureError."""
    import struct
    import zlib

    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own limit of pixels lies above ours; the rest are about EXIF
            with Image.open(_stream(source), formats=tuple(formats)) as image:
                _check_kind(image, most)
                yield image
    except PictureError:
        raise
    except Image.UnidentifiedImageError as error:
        raise PictureError(f"cannot be read as an image: it is none of {', '.join(formats)}") from error
    except Image.DecompressionBombError as error:
        raise PictureError(f"has too many pixels; at most {most}") from error
    except (OSError, SyntaxError, ValueError, EOFError, KeyError, TypeError, struct.error, zlib.error) as error:
        # Pillow's readers raise all of these for damaged files.
        reason = " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__
        raise PictureError(f"cannot be read as an image: {reason}") from error


def _check_kind(image: Image.Image, most: int) -> None:
    width, height = image.size
    if width * height > most:
        raise PictureError(f"has {width} x {height} pixels, more than {most}; make it smaller")
    if image.mode not in (*PLAIN, *TRANSPARENT, *DEEP):
        raise PictureError(f"has pixels of mode '{image.mode}'; convert it to RGB with 8 bits")
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # of which the first is the photograph
        raise PictureError(f"has {frames} frames; give one picture per file")


def _check_png(source: Encoded) -> None:
    """Raise for a PNG whose checksums are wrong or whose end is missing: Pillow shows what there is of it."""
    from PIL import Image

    with Image.open(_stream(source), formats=("PNG",)) as image:
        image.verify()


def _on_white(image: Image.Image) -> np.ndarray:
    if image.mode in DEEP:
        grey = np.asarray(image).astype(np.float32)  # in the machine's own order of bytes
        clear = image.info.get("transparency")
        scaled = grey / np.float32(65535)
        if isinstance(clear, int):
            scaled = np.where(grey == clear, np.float32(1), scaled)
        return np.repeat(scaled[..., None], 3, axis=2)
    if image.mode in PLAIN and "transparency" not in image.info and not _has_clear_palette(image):
        plain = np.asarray(image.convert("RGB")).astype(np.float32)
        plain /= 255  # in place: a large picture is in memory once
        return plain
    whole = image.convert("LA") if image.mode == "La" else image
    pixels = np.asarray(whole.convert("RGBA")).astype(np.float32) / 255
    colours, alpha = pixels[..., :3], pixels[..., 3:]
    return colours * alpha + (1 - alpha)


def _has_clear_palette(image: Image.Image) -> bool:
    return image.mode == "P" and image.palette is not None and image.palette.mode == "RGBA"


def _stream(source: Encoded) -> Path | io.BytesIO:
    return io.BytesIO(source) if isinstance(source, bytes) else source
