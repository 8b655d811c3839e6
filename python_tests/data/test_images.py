"""One file to pixels: each kind of image against Pillow's own operations, and every kind of file that is refused."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from sage_fast.data.images import MAX_SIDE, UnreadableImage, load_image, to_float
from sage_fast.data.writers import to_uint8
from sage_fast.errors import InputError

LANCZOS = Image.Resampling.LANCZOS


def photo(width: int = 50, height: int = 40, seed: int = 0) -> Image.Image:
    """A smooth picture with some noise; no two rows, columns or channels are alike."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    base = np.stack([x * 255 / width, y * 255 / height, (x + y) * 255 / (width + height)], axis=-1)
    return Image.fromarray(np.clip(base + rng.normal(0, 12, base.shape), 0, 255).astype(np.uint8))


def by_hand(image: Image.Image, resolution: int) -> np.ndarray:
    """Square and resize of the written rule, with Pillow only; [C, R, R]."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    pixels = np.asarray(image.resize((resolution, resolution), LANCZOS, reducing_gap=None))
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def check(path: Path, expected: Image.Image, resolution: int = 16) -> None:
    got = load_image(path, resolution, len(expected.getbands()))
    assert got.dtype == torch.uint8
    assert got.is_contiguous()
    np.testing.assert_array_equal(got.numpy(), by_hand(expected, resolution))


@pytest.mark.parametrize("size", [(50, 40), (40, 51), (33, 33), (16, 16), (7, 5), (3, 90)])
@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "ppm", "tif", "webp"])
def test_rgb_of_any_shape(tmp_path, size, suffix):
    path = tmp_path / f"a.{suffix}"
    photo(*size).save(path)
    check(path, Image.open(path).convert("RGB"))
    check(path, Image.open(path).convert("L"))


def test_the_square_is_the_centre_and_stays_when_the_size_fits(tmp_path):
    picture = photo(23, 16)
    picture.save(tmp_path / "a.png")
    got = load_image(tmp_path / "a.png", 16)
    np.testing.assert_array_equal(got.numpy(), np.asarray(picture)[:, 3:19].transpose(2, 0, 1))


def test_grey(tmp_path):
    grey = photo().convert("L")
    grey.save(tmp_path / "a.png")
    check(tmp_path / "a.png", grey)
    check(tmp_path / "a.png", grey.convert("RGB"))


def test_one_bit(tmp_path):
    bits = photo().convert("L").point(lambda v: 255 * (v > 128)).convert("1")
    bits.save(tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").mode == "1"
    check(tmp_path / "a.png", bits.convert("L"))
    assert len(load_image(tmp_path / "a.png", 16, 1).unique()) > 2  # averaged, not nearest


def rgba() -> Image.Image:
    picture = photo().convert("RGBA")
    alpha = np.tile(np.linspace(0, 255, 50).astype(np.uint8), (40, 1))
    picture.putalpha(Image.fromarray(alpha))
    return picture


def over_white(picture: Image.Image) -> Image.Image:
    picture = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def test_rgba_is_composited_over_white_or_kept(tmp_path):
    rgba().save(tmp_path / "a.png")
    check(tmp_path / "a.png", over_white(rgba()))
    check(tmp_path / "a.png", over_white(rgba()).convert("L"))
    check(tmp_path / "a.png", rgba())
    check(tmp_path / "a.png", rgba().convert("LA"))


def test_fully_transparent_is_white(tmp_path):
    Image.new("RGBA", (9, 9), (10, 20, 30, 0)).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png", 4).unique().tolist() == [255]


def test_grey_with_alpha(tmp_path):
    rgba().convert("LA").save(tmp_path / "a.png")
    check(tmp_path / "a.png", over_white(rgba().convert("LA")))
    check(tmp_path / "a.png", rgba().convert("LA"))


def test_opaque_gets_full_alpha(tmp_path):
    photo().save(tmp_path / "a.jpg")
    assert load_image(tmp_path / "a.jpg", 8, 4)[3].unique().tolist() == [255]
    assert load_image(tmp_path / "a.jpg", 8, 2)[1].unique().tolist() == [255]


def test_palette(tmp_path):
    palette = photo().quantize(32)
    palette.save(tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").mode == "P"
    check(tmp_path / "a.png", palette.convert("RGB"))


@pytest.mark.parametrize("transparency", [3, bytes(range(0, 256, 8))])
def test_palette_with_transparency(tmp_path, transparency):
    photo().quantize(32).save(tmp_path / "a.png", transparency=transparency)
    stored = Image.open(tmp_path / "a.png")
    assert stored.mode == "P"
    assert "transparency" in stored.info
    check(tmp_path / "a.png", over_white(stored))
    check(tmp_path / "a.png", stored.convert("RGBA"))


def test_gif_with_transparency_uses_the_first_frame(tmp_path):
    frames = [photo(seed=i).quantize(16) for i in range(3)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], transparency=2)
    check(tmp_path / "a.gif", over_white(Image.open(tmp_path / "a.gif")))


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_transparent_key_colour(tmp_path, mode):
    picture = Image.new(mode, (20, 20), 0 if mode == "L" else (0, 0, 0))
    picture.paste(200 if mode == "L" else (200, 10, 10), (5, 5, 15, 15))
    picture.save(tmp_path / "a.png", transparency=0 if mode == "L" else (0, 0, 0))
    got = load_image(tmp_path / "a.png", 20)
    assert got[:, 0, 0].tolist() == [255, 255, 255]
    assert got[0, 10, 10] == 200


def test_cmyk(tmp_path):
    for suffix in ("jpg", "tif"):
        photo().convert("CMYK").save(tmp_path / f"a.{suffix}")
        stored = Image.open(tmp_path / f"a.{suffix}")
        assert stored.mode == "CMYK"
        check(tmp_path / f"a.{suffix}", stored.convert("RGB"))
        close = by_hand(photo(), 16).astype(int) - load_image(tmp_path / f"a.{suffix}", 16).numpy()
        assert abs(close).mean() < 6  # colours of the original: not inverted


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path, suffix):
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(values).save(tmp_path / f"a.{suffix}")
    assert Image.open(tmp_path / f"a.{suffix}").mode.startswith("I")
    expected = np.round(values.astype(np.float64) / 257).astype(np.uint8)
    np.testing.assert_array_equal(load_image(tmp_path / f"a.{suffix}", 256, 1)[0].numpy(), expected)
    np.testing.assert_array_equal(load_image(tmp_path / f"a.{suffix}", 256, 3)[2].numpy(), expected)
    check(tmp_path / f"a.{suffix}", Image.fromarray(expected))


def test_16_bit_grey_of_other_containers(tmp_path):
    values = (np.arange(20 * 20, dtype=np.uint16) * 160).reshape(20, 20)
    expected = np.round(values.astype(np.float64) / 257).astype(np.uint8)
    (tmp_path / "a.pgm").write_bytes(b"P5 20 20 65535\n" + values.astype(">u2").tobytes())
    Image.frombytes("I;16B", (20, 20), values.astype(">u2").tobytes()).save(tmp_path / "b.tif")
    for name in ("a.pgm", "b.tif"):
        np.testing.assert_array_equal(load_image(tmp_path / name, 20, 1)[0].numpy(), expected)


def png(width: int, height: int, depth: int, colour: int, rows: bytes, extra: bytes = b"") -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def test_16_bit_colour_keeps_the_high_byte(tmp_path):
    values = np.random.default_rng(0).integers(0, 65536, (8, 8, 3)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    (tmp_path / "a.png").write_bytes(png(8, 8, 16, 2, rows))
    np.testing.assert_array_equal(load_image(tmp_path / "a.png", 8).numpy(), (values >> 8).transpose(2, 0, 1))


def test_16_bit_grey_with_transparent_key(tmp_path):
    body = b"tRNS" + struct.pack(">H", 1000)
    key = struct.pack(">I", 2) + body + struct.pack(">I", zlib.crc32(body))
    rows = b"".join(b"\0" + np.array([1000, 1001, 40000, 0], ">u2").tobytes() for _ in range(4))
    (tmp_path / "a.png").write_bytes(png(4, 4, 16, 0, rows, key))
    assert load_image(tmp_path / "a.png", 4, 2)[1, 0].tolist() == [0, 255, 255, 255]
    assert load_image(tmp_path / "a.png", 4, 1)[0, 0].tolist() == [255, 4, 156, 0]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_exif_orientation(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    photo(41, 30).save(path, exif=exif)
    check(path, ImageOps.exif_transpose(Image.open(path)), resolution=30)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_does_not_cost_the_image(tmp_path):
    photo().save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12")
    assert load_image(tmp_path / "a.jpg", 16).shape == (3, 16, 16)


def test_the_content_counts_not_the_suffix(tmp_path):
    photo().save(tmp_path / "a.png")
    os.rename(tmp_path / "a.png", tmp_path / "a.jpg")
    check(tmp_path / "a.jpg", photo())


def test_grey_and_colour_to_float_and_back():
    every = torch.arange(256, dtype=torch.uint8)
    assert to_float(every).min() == -1
    assert to_float(every).max() == 1
    assert torch.equal(to_uint8(to_float(every)), every)


def whole(suffix: str) -> bytes:
    buffer = io.BytesIO()
    photo(64, 64).save(buffer, format={"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix.upper()))
    return buffer.getvalue()


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "ppm", "tif", "webp", "gif"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.9])
def test_truncated(tmp_path, suffix, share):
    content = whole(suffix)
    (tmp_path / f"a.{suffix}").write_bytes(content[: int(len(content) * share)])
    with pytest.raises(UnreadableImage, match="cannot be read: .*; replace it or remove it"):
        load_image(tmp_path / f"a.{suffix}", 16)


def too_wide(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(20_000, 20_000, 8, 0, b""))


def long_strip(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(20_000, 2, 8, 0, b"\0" * 40_002))


def many_pixels(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(10_000, 10_000, 8, 0, b""))


def floating(tmp_path: Path) -> None:
    Image.new("F", (8, 8), 0.5).save(tmp_path / "a.png", format="TIFF")


def wide_integers(tmp_path: Path) -> None:
    Image.new("I", (8, 8), 200).save(tmp_path / "a.png", format="TIFF")


BAD = {
    "no such file": lambda folder: None,
    "the file is empty": lambda folder: (folder / "a.png").write_bytes(b""),
    "not an image of a known format": lambda folder: (folder / "a.png").write_bytes(b"no picture at all" * 10),
    "not a regular file": lambda folder: os.mkfifo(folder / "a.png"),
    "20000 x 20000 pixels": too_wide,
    "20000 x 2 pixels, more than 16,384 on a side": long_strip,
    "10000 x 10000 pixels": many_pixels,
    "cannot be read: floating-point pixels of unknown range; convert it to 8 or 16 bits": floating,
    "cannot be read: 32-bit or signed integer pixels of unknown range; convert it to 8 or 16 bits": wide_integers,
}


@pytest.mark.parametrize("reason", BAD)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_refused(tmp_path, reason):
    BAD[reason](tmp_path)
    expected = reason if reason != "20000 x 20000 pixels" else "more than 89,478,485 pixels"
    with pytest.raises(UnreadableImage, match=expected) as caught:
        load_image(tmp_path / "a.png", 16)
    assert "a.png" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, InputError)


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
def test_a_bomb_is_refused_when_warnings_are_errors(tmp_path):
    many_pixels(tmp_path)
    with pytest.raises(UnreadableImage, match="more than 89,478,485 pixels"):
        load_image(tmp_path / "a.png", 16)


def test_a_directory_and_a_broken_link(tmp_path):
    (tmp_path / "d.png").mkdir()
    (tmp_path / "l.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(UnreadableImage, match="not a regular file"):
        load_image(tmp_path / "d.png", 16)
    with pytest.raises(UnreadableImage, match="no such file"):
        load_image(tmp_path / "l.png", 16)


@pytest.mark.parametrize(("resolution", "n_channels"), [(0, 3), (MAX_SIDE + 1, 3), (16, 0), (16, 5)])
def test_settings(tmp_path, resolution, n_channels):
    photo().save(tmp_path / "a.png")
    with pytest.raises(InputError, match="must be 1"):
        load_image(tmp_path / "a.png", resolution, n_channels)


@pytest.mark.parametrize(("resolution", "n_channels"), [(32.0, 3), ("32", 3), (32, 3.0)])
def test_settings_of_another_type(tmp_path, resolution, n_channels):
    photo().save(tmp_path / "a.png")
    with pytest.raises(TypeError):
        load_image(tmp_path / "a.png", resolution, n_channels)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(suffix=st.sampled_from(["png", "jpg", "gif", "webp", "tif", "bmp"]), data=st.data())
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_file_gives_pixels_or_the_one_error(tmp_path, suffix, data):
    content = bytearray(whole(suffix))
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "a.png").write_bytes(bytes(content))
    try:
        assert load_image(tmp_path / "a.png", 8).shape == (3, 8, 8)
    except UnreadableImage as error:
        assert "\n" not in str(error)
