"""Pixels to the bytes of a PNG, JPEG or WebP file, by one named library, with a line of provenance in it.

Which library is fastest on the host was measured: docs/generation.md. Bytes depend on the library and its version, so both are part
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
import torch
from PIL import Image
from PIL import __version__ as pillow_version
from torch import Tensor

from sage_fast.errors import InputError, counted

__all__ = ["Encoder", "choose_encoder", "to_host", "with_provenance"]

_MODULES = {"opencv": "cv2", "simplejpeg": "simplejpeg", "pillow": "PIL", "nvjpeg": "torchvision"}
_AUTO = ("opencv", "simplejpeg", "pillow")  # fastest first; nvjpeg has not been timed against them
_CHANNELS = {"png": (1, 2, 3, 4), "jpg": (1, 3), "webp": (3, 4)}
_QUALITY = 95  # of jpg and webp
_PNG_HEADER = 33  # bytes of the signature and of IHDR, behind which text may stand


@dataclass(frozen=True)
class Encoder:
    """``encode`` takes one image, uint8 [H, W, C] (``[H, W]`` when C is 1), ``bgr`` of them colours in reverse order.

    ``name`` is the library with its version. ``encode_batch``, where the library works on a GPU, gives the files of images,
    uint8 [n, C, H, W] in RGB, that lie there or on the host.
    """

    name: str
    image: str
    bgr: bool
    encode: Callable[[np.ndarray], bytes]
    encode_batch: Callable[[Tensor], list[bytes]] | None = None


def to_host(encoder: Encoder | None, images: Tensor) -> Tensor | list[bytes]:
    """Drawn images, uint8 [n, C, H, W], on the host: as files, if the encoder works on a GPU."""
    return images.cpu() if encoder is None or encoder.encode_batch is None else encoder.encode_batch(images)


def choose_encoder(
    library: str, image: str, quality: int | None, n_channels: int, device: torch.device = torch.device("cpu")
) -> Encoder:
    """The encoder of a library, or of the fastest one on the host that is installed.

    Args:
        library: auto, pillow, opencv, simplejpeg or nvjpeg.
        image: png, jpg or webp.
        quality: of jpg and webp 1 to 100, of png zlib's level 0 to 9; None: 95, or the library's fast level.
        n_channels: of the images.
        device: where they are drawn.
    Raises:
        InputError: the library is not installed, or cannot encode images of so many channels, or not on the device.
    """
    if n_channels not in _CHANNELS[image]:
        known = " or ".join(name for name, channels in _CHANNELS.items() if n_channels in channels)
        raise InputError(
            f"Images of {counted(n_channels, 'channel')} cannot be stored as {image}; choose image {known}."
        )
    able = [name for name in _MODULES if _can(name, image, n_channels)]
    auto = next((name for name in _AUTO if name in able and _is_installed(name)), "pillow")
    chosen = auto if library == "auto" else library
    if chosen not in able:
        raise InputError(
            f"encoder '{chosen}' cannot store {counted(n_channels, 'channel')} as {image}; choose {' or '.join(able)}."
        )
    if chosen == "nvjpeg" and not _is_gpu(device):
        raise InputError(
            f"encoder 'nvjpeg' needs the model on a GPU, got it on {device}; use device cuda, or choose pillow."
        )
    if not _is_installed(chosen):
        raise InputError(f"encoder '{chosen}' is not installed; pip install 'sage_fast[{chosen}]', or choose pillow.")
    if chosen == "nvjpeg":
        return _nvjpeg(quality, device)
    return {"opencv": _opencv, "simplejpeg": _simplejpeg, "pillow": _pillow}[chosen](image, quality)


def _is_installed(library: str) -> bool:
    try:
        return find_spec(_MODULES[library]) is not None
    except ValueError:  # another thread is importing it
        return True


def _can(library: str, image: str, n_channels: int) -> bool:
    jpg = image == "jpg"
    return {"opencv": n_channels != 2, "simplejpeg": jpg, "pillow": True, "nvjpeg": jpg and n_channels == 3}[library]


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


def _nvjpeg(quality: int | None, device: torch.device) -> Encoder:
    """torchvision's ``encode_jpeg`` on a GPU: 4:4:4, as the others."""
    try:
        import torchvision
        from torchvision.io import encode_jpeg

        encode_jpeg([torch.zeros(3, 16, 16, dtype=torch.uint8, device=device)])
    except (ImportError, AttributeError, RuntimeError) as error:  # made for another torch, or without nvJPEG
        reason = str(error).split("\n")[0].split(". ")[0].rstrip(".")
        raise InputError(
            f"encoder 'nvjpeg' cannot encode on {device} ({reason}); install a torchvision that has nvJPEG, or choose pillow."
        ) from error

    def encode_batch(images: Tensor) -> list[bytes]:
        images = (images if _is_gpu(images.device) else images.to(device)).contiguous()
        _wait_for(images.device)
        files = encode_jpeg(list(images), quality=quality or _QUALITY)
        _wait_for(images.device)
        host = torch.empty(sum(map(len, files)), dtype=torch.uint8, pin_memory=images.is_cuda)
        host.copy_(torch.cat(files))
        return [file.numpy().tobytes() for file in host.split([len(file) for file in files])]

    def encode(pixels: np.ndarray) -> bytes:
        return encode_batch(torch.from_numpy(pixels).permute(2, 0, 1)[None])[0]

    return Encoder(f"nvjpeg {torchvision.__version__}", "jpg", False, encode, encode_batch)


def _is_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


def _wait_for(device: torch.device) -> None:
    """Until a GPU has done everything: torchvision encodes on a stream of its own, and not every version waits."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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
