"""Bytes of image files: every library, what is said in them, and that they are read back."""

from __future__ import annotations

import io
import json
import sys
from importlib.util import find_spec

import numpy as np
import pytest
from PIL import Image

from sage_fast.errors import InputError
from sage_fast.generation.encoding import choose_encoder, with_provenance

LIBRARIES = {"pillow": "PIL", "opencv": "cv2", "simplejpeg": "simplejpeg"}
CASES = [
    (library, image, channels)
    for library in LIBRARIES
    for image, all_channels in (("png", (1, 3, 4)), ("jpg", (1, 3)), ("webp", (3, 4)))
    for channels in all_channels
    if library != "simplejpeg" or image == "jpg"
]


def picture(channels, side=24):
    y, x = np.mgrid[:side, :side] / side
    pixels = np.stack([200 * x, 200 * y, 100 + 100 * x * y, 255 - 60 * x][:channels], -1).astype(np.uint8)
    return pixels[:, :, 0] if channels == 1 else pixels


def encode(encoder, pixels):
    bgr = pixels[:, :, [2, 1, 0, 3][: pixels.shape[2]]] if encoder.bgr and pixels.ndim == 3 else pixels
    return encoder.encode(np.ascontiguousarray(bgr))


@pytest.mark.parametrize(("library", "image", "channels"), CASES)
def test_what_is_encoded_is_read_back(library, image, channels):
    pytest.importorskip(LIBRARIES[library])
    pixels, encoder = picture(channels), choose_encoder(library, image, None, channels)
    data = encode(encoder, pixels)
    assert data == encode(choose_encoder(library, image, None, channels), pixels)
    assert encoder.name.split()[0] == library and encoder.name.split()[1][0].isdigit()
    read = np.asarray(Image.open(io.BytesIO(data)))
    if image == "png":
        np.testing.assert_array_equal(read, pixels)
    else:
        assert read.shape == pixels.shape and np.abs(read.astype(int) - pixels).mean() < 3


@pytest.mark.parametrize(("library", "image"), [(lib, image) for lib, image, channels in CASES if channels == 3])
def test_quality_changes_the_size(library, image):
    pytest.importorskip(LIBRARIES[library])
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8) // 64 * 64
    low, high = (9, 1) if image == "png" else (30, 95)
    sizes = [len(encode(choose_encoder(library, image, quality, 3), noise)) for quality in (low, high)]
    assert sizes[0] < sizes[1]


@pytest.mark.parametrize(("library", "image", "channels"), [case for case in CASES if case[1] != "webp"])
def test_png_and_jpeg_say_what_they_are(library, image, channels):
    pytest.importorskip(LIBRARIES[library])
    data = encode(choose_encoder(library, image, None, channels), picture(channels))
    about = {"category": "rosé", "index": 3}
    with Image.open(io.BytesIO(with_provenance(data, image, about))) as read:
        plain = np.asarray(Image.open(io.BytesIO(data)))
        np.testing.assert_array_equal(np.asarray(read), plain)
        text = read.info["Comment"] if image == "png" else read.info["comment"].decode()
    assert json.loads(text.removeprefix("sage_fast ")) == about


def test_auto_takes_the_fastest_that_is_installed(monkeypatch):
    installed = {"cv2", "simplejpeg", "PIL"}
    monkeypatch.setattr("sage_fast.generation.encoding.find_spec", lambda name: name in installed or None)
    names = []
    for missing in ((), ("cv2",), ("simplejpeg",)):
        installed -= set(missing)
        monkeypatch.setattr("sage_fast.generation.encoding._opencv", lambda *a: "opencv")
        monkeypatch.setattr("sage_fast.generation.encoding._simplejpeg", lambda *a: "simplejpeg")
        monkeypatch.setattr("sage_fast.generation.encoding._pillow", lambda *a: "pillow")
        names.append([choose_encoder("auto", image, None, 3) for image in ("png", "jpg")])
    assert names == [["opencv", "opencv"], ["pillow", "simplejpeg"], ["pillow", "pillow"]]


def test_what_cannot_be_stored_is_refused(monkeypatch):
    for library, image, channels, words in (
        ("auto", "jpg", 4, "cannot be stored as jpg; choose image png or webp"),
        ("auto", "webp", 1, "choose image png or jpg"),
        ("opencv", "png", 2, "choose pillow"),
    ):
        with pytest.raises(InputError, match=words):
            choose_encoder(library, image, None, channels)
    assert choose_encoder("auto", "png", None, 2).name.startswith("pillow")
    monkeypatch.setattr("sage_fast.generation.encoding.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"not installed; pip install 'sage_fast\[opencv\]'"):
        choose_encoder("opencv", "png", None, 3)
    assert find_spec("PIL")


def test_a_library_that_another_thread_is_importing_is_installed(monkeypatch):
    pytest.importorskip("cv2")
    monkeypatch.setattr(sys.modules["cv2"], "__spec__", None)
    assert choose_encoder("auto", "png", None, 3).name.startswith("opencv")
