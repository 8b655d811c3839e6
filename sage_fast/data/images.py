"""One image file to one uint8 array, by one written rule.

The rule, in order:

1. The first frame is decoded (PNG, JPEG, BMP, GIF, PPM/PGM/PBM, TIFF, WebP; told by content, not by suffix) and
   turned upright by its EXIF orientation.
2. The largest centred square is cut out: ``side = min(width, height)``, ``left = (width - side) // 2``,
   ``top = (height - side) // 2``.
3. The pixels become 8-bit grey (``n_channels`` 1), grey + alpha (2), RGB (3) or RGBA (4):

   * colour to grey is Pillow's ``convert("L")`` (ITU-R 601-2 luma), CMYK and YCbCr to colour is its ``convert("RGB")``;
     embedded colour profiles are not applied;
   * 16-bit grey becomes 8-bit as ``round(v / 257)``, so 65535 -> 255 (Pillow itself would clip it); 16 bits in several
     channels are cut to the high byte by Pillow's decoder; 32-bit and signed integers and floating-point pixels (TIFF, PFM)
     are refused, as nothing says which value is white;
   * transparency of any kind (RGBA, grey + alpha, a transparent palette entry or key colour) is composited over white
     when 1 or 3 channels are asked for, and kept as the last channel for 2 or 4; an opaque image gets alpha 255.

4. The square is scaled by ``resize((R, R), Resampling.LANCZOS, reducing_gap=None)``, up or down; with alpha Pillow
   does this on premultiplied colour. A square of side R stays as it is. JPEG draft mode is not used: it would replace
   part of this filter by the codec's own.
"""

from __future__ import annotations

import io
import operator
import os
import stat
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from sage_fast.errors import InputError, reason_of

IMAGE_SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".gif", ".pbm", ".pgm", ".ppm", ".pnm", ".tif", ".tiff", ".webp",
)  # fmt: skip
MAX_SIDE = 16_384
MAX_PIXELS = 89_478_485  # Pillow's own threshold: a quarter of a GiB of RGB

RULE = 2  # number of the rule above: another one, other pixels
MAX_BYTES = 2**28  # of an image that is handed over as bytes
Content: TypeAlias = str | os.PathLike[str] | bytes | Image.Image  # a file, what is in it, or what it decodes to

_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "WEBP", "TIFF")
_GREY_16 = ("PNG", "PPM")  # Pillow opens their 16 bits as the 32-bit mode "I", as 0 to 65535
_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
_ORIENTATION = 0x0112  # EXIF tag
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnreadableImage(InputError):
    """One image file that cannot be used; ``path`` names it and ``reason`` says why in a few words."""

    def __init__(self, path: str | os.PathLike[str], reason: str):
        self.path, self.reason = Path(path), reason
        super().__init__(f"Image {str(path)!r} cannot be read: {reason}; replace it or remove it.")


class SmallImage(UnreadableImage):
    """An image whose shorter side has fewer pixels than the resolution asked for."""


def load_image(path: str | os.PathLike[str], resolution: int, n_channels: int = 3) -> torch.Tensor:
    """Read one image file by the rule of this module.

    Args:
        path: image file.
        resolution: R, the side of the result in pixels, 1 to ``MAX_SIDE``.
        n_channels: 1 grey, 2 grey + alpha, 3 RGB, 4 RGBA.

    Returns:
        uint8 [n_channels, R, R].

    Raises:
        UnreadableImage: the file is missing, empty, damaged, truncated, no image, above ``MAX_SIDE`` pixels on a side
            or above ``MAX_PIXELS`` in all.
        InputError: ``resolution`` or ``n_channels`` is out of range.
        TypeError: ``resolution`` or ``n_channels`` is no integer.
    """
    check_pixels(resolution, n_channels)
    return torch.from_numpy(decode(path, resolution, n_channels).copy())


def to_float(images: torch.Tensor) -> torch.Tensor:
    """uint8 [..., C, H, W] to float32 in [-1, 1]: ``x / 127.5 - 1``; ``writers.to_uint8`` undoes it exactly."""
    return images.to(torch.float32) / 127.5 - 1.0


def check_pixels(resolution: int, n_channels: int) -> None:
    """Raise ``InputError`` unless ``resolution`` is 1 to ``MAX_SIDE`` and ``n_channels`` 1 to 4."""
    if not 1 <= operator.index(resolution) <= MAX_SIDE:
        raise InputError(f"resolution must be 1 to {MAX_SIDE} pixels, got {resolution}.")
    if operator.index(n_channels) not in _MODES:
        raise InputError(f"n_channels must be 1 (grey), 2 (grey + alpha), 3 (RGB) or 4 (RGBA), got {n_channels}.")


def decode(
    content: Content, resolution: int, n_channels: int, name: str | os.PathLike[str] = "", upscale: bool = True
) -> np.ndarray:
    """``load_image`` without the checks of the settings: uint8 [n_channels, R, R], possibly a strided view.

    Args:
        content: the path of an image file, its bytes, or an image of Pillow's (no byte limit then; it is not changed).
        name: for messages, where ``content`` is no path.
        upscale: False refuses an image that has to be enlarged with ``SmallImage``.
    """
    name = name or (content if isinstance(content, str | os.PathLike) else "in memory")
    try:
        with _open(content, name) as image:
            if not upscale and min(image.size) < resolution:
                raise SmallImage(name, f"{image.width} x {image.height} pixels, smaller than {resolution}")
            _check_range(image, name)
            image.load()
            square = _convert(_centre_square(_upright(image)), _MODES[n_channels])
        pixels = np.asarray(square.resize((resolution, resolution), Image.Resampling.LANCZOS, reducing_gap=None))
    except Exception as error:
        raise _unreadable(name, error) from error
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def shorter_side(content: Content, name: str | os.PathLike[str] = "") -> int:
    """Pixels of the shorter side, from the header alone; raises ``UnreadableImage``."""
    try:
        with _open(content, name) as image:
            return min(image.size)
    except Exception as error:
        raise _unreadable(name, error) from error


def _open(content: Content, name: str | os.PathLike[str]) -> AbstractContextManager[Image.Image]:
    """The image, of a size that is allowed and not yet decoded."""
    if isinstance(content, Image.Image):
        _check_size(name, content.size)
        return nullcontext(content)
    if isinstance(content, bytes):
        _check_length(name, len(content))
        image = Image.open(io.BytesIO(content), formats=_FORMATS)
    else:
        _check_file(content)
        image = Image.open(content, formats=_FORMATS)
    try:
        _check_size(name, image.size)
    except UnreadableImage:
        image.close()
        raise
    return image


def _unreadable(name: str | os.PathLike[str], error: Exception) -> UnreadableImage:
    """What a decoder raised, in our words; damaged files meet it with almost any exception type."""
    if isinstance(error, UnreadableImage):
        return error
    if isinstance(error, UnidentifiedImageError):
        return UnreadableImage(name, f"not an image of a known format ({', '.join(_FORMATS)})")
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning | MemoryError):
        return UnreadableImage(name, f"more than {MAX_PIXELS:,} pixels")
    return UnreadableImage(name, f"truncated or damaged ({reason_of(error)})")


def _check_file(path: str | os.PathLike[str]) -> None:
    try:
        status = os.stat(path)
    except FileNotFoundError as error:
        raise UnreadableImage(path, "no such file") from error
    except OSError as error:
        raise UnreadableImage(path, error.strerror or "cannot be opened") from error
    if not stat.S_ISREG(status.st_mode):
        raise UnreadableImage(path, "not a regular file")
    if status.st_size == 0:
        raise UnreadableImage(path, "the file is empty")
    if not os.access(path, os.R_OK):
        raise UnreadableImage(path, "no permission to read it")


def _check_length(name: str | os.PathLike[str], n_bytes: int) -> None:
    if n_bytes == 0:
        raise UnreadableImage(name, "the file is empty")
    if n_bytes > MAX_BYTES:
        raise UnreadableImage(name, f"more than {MAX_BYTES:,} bytes")


def _check_size(path: str | os.PathLike[str], size: tuple[int, int]) -> None:
    width, height = size
    if max(size) > MAX_SIDE:
        raise UnreadableImage(path, f"{width} x {height} pixels, more than {MAX_SIDE:,} on a side")
    if width * height > MAX_PIXELS:
        raise UnreadableImage(path, f"{width} x {height} pixels, more than {MAX_PIXELS:,} in all")


def _check_range(image: Image.Image, name: str | os.PathLike[str]) -> None:
    """Refuse pixels of which nothing says which value is white."""
    remedy = "of unknown range; convert it to 8 or 16 bits"
    if image.mode == "F":
        raise UnreadableImage(name, f"floating-point pixels {remedy}")
    if image.mode == "I" and image.format not in _GREY_16:
        raise UnreadableImage(name, f"32-bit or signed integer pixels {remedy}")


def _upright(image: Image.Image) -> Image.Image:
    orientation = 1
    with suppress(Exception):  # damaged EXIF beside whole pixels: the pixels count
        orientation = image.getexif().get(_ORIENTATION, 1)
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _centre_square(image: Image.Image) -> Image.Image:
    width, height = image.size
    if width == height:
        return image
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return image.crop((left, top, left + side, top + side))


def _convert(image: Image.Image, mode: str) -> Image.Image:
    """Any Pillow image to 8-bit L, LA, RGB or RGBA; transparency is composited over white for L and RGB."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = _grey_16_to_8(image)
    if image.mode in ("La", "RGBa"):
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")
        if mode in ("L", "RGB"):
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            image = Image.alpha_composite(white, image).convert("RGB")
    elif image.mode not in ("1", "L", "RGB"):
        image = image.convert("RGB")
    return image if image.mode == mode else image.convert(mode)


def _grey_16_to_8(image: Image.Image) -> Image.Image:
    """Grey of 0..65535 to 8 bits as round(v / 257) (257 is odd: no ties); a transparent key value becomes alpha 0."""
    values = np.asarray(image).astype(np.int64)
    grey = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    key = image.info.get("transparency")
    if isinstance(key, int):
        grey.putalpha(Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)))
    return grey
