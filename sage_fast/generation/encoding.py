"""Pixels to the bytes of a PNG, JPEG or WebP file, by one named library, with a line of provenance in it.

Which library is fastest was measured: docs/generation.md. Bytes depend on the library and its version, so both are part
of what a run is (:attr:`Encoder.name`).
"""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
from PIL import Image
from PIL import __version__ as pillow_version

from sage_fast.errors import InputError

__all__ = ["Encoder", "choose_encoder", "with_provenance"]

_MODULES = {"opencv": "cv2", "simplejpeg": "simplejpeg", "pillow": "PIL"}  # fastest first
_CHANNELS = {"png": (1, 2, 3, 4), "jpg": (1, 3), "webp": (3, 4)}
_QUALITY = 95  # of jpg and webp
_PNG_HEADER = 33  # bytes of the signature and of IHDR, behind which text may stand


@dataclass(frozen=True)
class Encoder:
    """``encode`` takes one image, uint8 [H, W, C] (``[H, W]`` when C is 1), ``bgr`` of them colours in reverse order.

    ``name`` is the library with its version.
    """

    name: str
    image: str
    bgr: bool
    encode: Callable[[np.ndarray], bytes]


def choose_encoder(library: str, image: str, quality: int | None, n_channels: int) -> Encoder:
    """The encoder of a library, or of the fastest one that is installed.

    Args:
        library: auto, pillow, opencv or simplejpeg.
        image: png, jpg or webp.
        quality: of jpg and webp 1 to 100, of png zlib's level 0 to 9; None: 95, or the library's fast level.
        n_channels: of the images.
    Raises:
        InputError: the library is not installed, or cannot encode images of so many channels.
    """
    if n_channels not in _CHANNELS[image]:
        known = " or ".join(name for name, channels in _CHANNELS.items() if n_channels in channels)
        raise InputError(f"Images of {n_channels} channels cannot be stored as {image}; choose image {known}.")
    able = [name for name in _MODULES if _can(name, image, n_channels)]
    chosen = next((name for name in able if find_spec(_MODULES[name])), "pillow") if library == "auto" else library
    if chosen not in able:
        raise InputError(
            f"encoder '{chosen}' cannot store {n_channels} channels as {image}; choose {' or '.join(able)}."
        )
    if find_spec(_MODULES[chosen]) is None:
        raise InputError(f"encoder '{chosen}' is not installed; pip install 'sage_fast[{chosen}]', or choose pillow.")
    return {"opencv": _opencv, "simplejpeg": _simplejpeg, "pillow": _pillow}[chosen](image, quality)


def _can(library: str, image: str, n_channels: int) -> bool:
    return {"opencv": n_channels != 2, "simplejpeg": image == "jpg", "pillow": True}[library]


def _opencv(image: str, quality: int | None) -> Encoder:
    import cv2

    settings = {
        "png": [] if quality is None else [cv2.IMWRITE_PNG_COMPRESSION, quality],
        "jpg": [
            cv2.IMWRITE_JPEG_QUALITY, quality or _QUALITY,
            cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
        ],
        "webp": [cv2.IMWRITE_WEBP_QUALITY, quality or _QUALITY],
    }[image]  # fmt: skip

    def encode(pixels: np.ndarray) -> bytes:
        done, data = cv2.imencode(f".{image}", pixels, settings)
        if not done:
            raise InputError(f"OpenCV could not encode an image of shape {list(pixels.shape)} as {image}.")
        return data.tobytes()

    return Encoder(f"opencv {cv2.__version__}", image, True, encode)


def _simplejpeg(image: str, quality: int | None) -> Encoder:
    import simplejpeg

    def encode(pixels: np.ndarray) -> bytes:
        space = "GRAY" if pixels.ndim == 2 else "RGB"
        pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels
        return simplejpeg.encode_jpeg(pixels, quality or _QUALITY, space, "444", fastdct=False)

    return Encoder(f"simplejpeg {simplejpeg.__version__}", image, False, encode)


def _pillow(image: str, quality: int | None) -> Encoder:
    settings: dict[str, Any] = {
        "png": {"format": "PNG", "compress_level": 1 if quality is None else quality},
        "jpg": {"format": "JPEG", "quality": quality or _QUALITY, "subsampling": 0},
        "webp": {"format": "WEBP", "quality": quality or _QUALITY, "method": 0},
    }[image]

    def encode(pixels: np.ndarray) -> bytes:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, **settings)
        return file.getvalue()

    return Encoder(f"pillow {pillow_version}", image, False, encode)


def with_provenance(data: bytes, image: str, about: Mapping[str, Any]) -> bytes:
    """The file ``data`` with ``about`` as JSON in it: a text chunk of PNG, a comment of JPEG; WebP has no such place."""
    text = json.dumps(about).encode("ascii")
    if image == "png":
        chunks = _text_chunk(b"Software", b"sage_fast") + _text_chunk(b"Comment", text)
        return data[:_PNG_HEADER] + chunks + data[_PNG_HEADER:]
    if image == "jpg":
        at = 2  # behind the start marker, or the JFIF segment that must come first
        if data[2:4] == b"\xff\xe0":
            at += 2 + struct.unpack(">H", data[4:6])[0]
        text = b"sage_fast " + text
        return data[:at] + b"\xff\xfe" + struct.pack(">H", len(text) + 2) + text + data[at:]
    return data


def _text_chunk(key: bytes, value: bytes) -> bytes:
    body = b"tEXt" + key + b"\0" + value
    return struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
