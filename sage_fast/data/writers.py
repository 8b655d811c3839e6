"""Files that are whole or absent, the picture formats the programs write, and the folders they write into."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import secrets
import shutil
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, final

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from sage_fast.errors import InputError

MARKER = ".sage_fast.json"
CACHE = "cache"  # folder of decoded images in a run's: no result, and checked whenever it is opened
LOCK, SETUP_LOCK = ".sage_fast.lock", ".sage_fast.setup.lock"
TEMPORARY = ".sage_fast.tmp"
_OWN_SUFFIXES = (
    ".png",
    ".json",
    ".jsonl",
    ".safetensors",
    ".pt",
    ".csv",
    ".md",
    ".html",
    ".svg",
    ".txt",
    ".tfevents",
    TEMPORARY,
)
# kinds that people keep too, so by their names: rose/rose_00012.jpg, shard-000003.tar, what a run needs while it works
_OWN_NAMES = re.compile(
    r"(.*/)?(([^/]+)/\3_\d{5,}\.(jpg|webp)|shard-\d{6,}\.tar|manifest\.parquet|SHA256SUMS"
    r"|\.sage_fast/.*|\.sage_fast(\.setup)?\.lock)",
    re.DOTALL,
)
SHELL_FILES = (".ds_store", "thumbs.db", "desktop.ini")  # dropped by desktops into any folder
_RESUMABLE = (MARKER, "manifest.jsonl", "bundle.json", "configs")
_WRITE_ERRORS = frozenset(
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EIO", "EACCES", "EPERM")
    if hasattr(errno, name)
)
_FULL = [getattr(errno, name) for name in ("ENOSPC", "EDQUOT") if hasattr(errno, name)]
_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
_GAP = 2  # pixels between the cells of a contact sheet
_BAND = 16  # pixels of the line of text above a section


class _Raw(io.RawIOBase):
    """A write-only file that remembers the first error, whatever a serialiser in between makes of it."""

    def __init__(self, descriptor: int):
        self.descriptor = descriptor
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        try:
            return os.write(self.descriptor, data)
        except OSError as error:
            self.error = self.error or error
            raise


@contextmanager
def atomic_write(
    path: str | os.PathLike[str],
    durable: bool = True,
    temporary: str | os.PathLike[str] | None = None,
    resumable: bool = False,
) -> Iterator[BinaryIO]:
    """Write a file that is whole or absent: yields a binary file; ``path`` appears when the block ends well.

    The bytes go to a hidden temporary file in the same folder, which is flushed, synchronised and renamed over
    ``path``. On any exception the temporary file is removed and an older ``path`` stays as it was.

    Args:
        path: the file to write; its folder must exist.
        durable: synchronise to the disk before renaming, so that the promise holds through a loss of power too.
        temporary: where the bytes go first, on the same disk; what lies there is replaced. None: a name of its own.
        resumable: see :func:`write_remedy`.

    Raises:
        InputError: the file cannot be written (disk full, no permission, no such folder ...).
    """
    path = Path(path)
    fresh = os.O_EXCL if temporary is None else os.O_TRUNC
    temporary = path.parent / f".{secrets.token_hex(8)}{TEMPORARY}" if temporary is None else temporary
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | fresh | getattr(os, "O_BINARY", 0), 0o666)
    except OSError as error:
        raise cannot_write(path, error, resumable) from error
    raw = _Raw(descriptor)
    handle = io.BufferedWriter(raw, buffer_size=1 << 17)
    try:
        yield handle
        try:
            handle.flush()
            if raw.error is not None:  # the block caught it, but bytes are missing
                raise raw.error
            if durable:
                os.fsync(descriptor)
            os.close(descriptor)
            descriptor = -1
            os.replace(temporary, path)
        except OSError as error:
            raise cannot_write(path, error, resumable) from error
    except InputError:
        raise
    except Exception as error:
        cause = raw.error or (error if isinstance(error, OSError) and error.errno in _WRITE_ERRORS else None)
        if cause is None:
            raise
        raise cannot_write(path, cause, resumable) from error
    finally:
        with suppress(OSError, ValueError):
            handle.close()
        if descriptor >= 0:
            os.close(descriptor)
        with suppress(FileNotFoundError):
            os.unlink(temporary)


def check_file(path: str | os.PathLike[str], name: str) -> None:
    """Refuse what ``atomic_write`` will refuse, before the work whose result the file is; ``name`` is the setting's.

    Raises:
        InputError: it is a folder, or its folder is not there or not to be written into.
    """
    path = Path(path)
    folder = path.absolute().parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise InputError(
            f"{name} must be a file in a folder that is there and can be written into, got {str(path)!r}; make the folder "
            "first or choose another place."
        )


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write ``content`` as indented JSON with sorted keys, atomically; InputError for a number that is not finite."""
    try:
        text = json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n"
    except ValueError as error:
        raise InputError(
            f"File {str(path)!r} cannot be written: JSON has finite numbers alone, got one that is not; correct the setting or "
            "the data that it comes from."
        ) from error
    with atomic_write(path) as file:
        file.write(text.encode("utf-8"))


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Float images of nominal range [-1, 1] to uint8: ``(x + 1) * 127.5``, rounded half to even, clamped to 0..255.

    Computed in float32 (float64 stays float64) on the images' device; the inverse of ``images.to_float``.

    Raises:
        TypeError: ``images`` is not a floating-point tensor.
        InputError: a value is not a number.
    """
    if not torch.is_tensor(images) or not images.is_floating_point():
        raise TypeError(
            f"images must be a floating-point tensor in [-1, 1], got {getattr(images, 'dtype', type(images))}."
        )
    values = images if images.dtype == torch.float64 else images.float()
    if torch.isnan(values).any():
        raise InputError("The images hold values that are not numbers; the model or its input is damaged.")
    return ((values + 1.0) * 127.5).round_().clamp_(0.0, 255.0).to(torch.uint8)


def save_png(
    path: str | os.PathLike[str],
    image: torch.Tensor | np.ndarray,
    text: Mapping[str, str] | None = None,
    durable: bool = True,
) -> None:
    """Write one image as PNG, atomically.

    Args:
        path: the file.
        image: uint8 [C, H, W], C = 1 grey, 2 grey + alpha, 3 RGB, 4 RGBA.
        text: key -> value written as text chunks (keys of 1 to 79 Latin-1 characters).
        durable: see ``atomic_write``.
    """
    chunks = PngImagePlugin.PngInfo()
    for key, value in (text or {}).items():
        chunks.add_text(key, value)
    encoded = io.BytesIO()
    _to_pillow(image).save(encoded, format="PNG", pnginfo=chunks)
    with atomic_write(path, durable) as file:
        file.write(encoded.getbuffer())


def contact_sheet(
    images: torch.Tensor | np.ndarray, columns: int, labels: Sequence[str] | None = None, scale: int = 1
) -> Image.Image:
    """Many images on one sheet, row by row.

    Args:
        images: uint8 [N, C, H, W].
        columns: cells per row, at least 1.
        labels: N names; equal neighbours form a section that starts a new row under its name.
        scale: each pixel becomes scale x scale pixels.

    Returns:
        An RGB picture on white (transparency is composited over white).

    Raises:
        InputError: no images, ``columns`` or ``scale`` below 1, or not one label per image.
    """
    if len(images) == 0 or columns < 1 or scale < 1:
        raise InputError(
            f"A contact sheet needs images, columns and a scale, got {len(images)}, {columns} and {scale}."
        )
    if labels is not None and len(labels) != len(images):
        raise InputError(f"labels must name each of the {len(images)} images, got {len(labels)} labels.")
    height, width = (scale * int(side) + _GAP for side in images.shape[2:])
    columns = min(columns, len(images))
    cells, bands, bottom = _place(len(images), columns, labels, width, height)
    sheet = Image.new("RGB", (columns * width + _GAP, bottom + _GAP), "white")
    for image, place in zip(images, cells):
        cell = _to_pillow(image).convert("RGBA")
        cell = cell.resize((scale * cell.width, scale * cell.height), Image.Resampling.NEAREST)
        sheet.paste(cell, place, cell)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for name, top in bands:
        draw.text((_GAP, top + 2), _fitting(name, sheet.width - 2 * _GAP, draw, font), fill="black", font=font)
    return sheet


@final
class ManifestWriter:
    """A file of one JSON object per line, appended to; every line in it is whole.

    A line that cannot be written to the end (a full disk) is taken back. With ``resume`` an existing file is read into
    ``entries``, an incomplete last line (the process was killed) is cut off, and lines are added behind the rest.
    One process writes a manifest at a time.
    """

    def __init__(self, path: str | os.PathLike[str], resume: bool = False):
        """Open ``path``; ``InputError`` when it exists and ``resume`` is not set, or when it is no manifest."""
        self.path = Path(path)
        self.entries: list[dict[str, Any]] = []
        exists = self.path.exists()
        if exists and not resume:
            raise InputError(f"Manifest {str(path)!r} exists already; resume it, remove it or choose another folder.")
        if exists:
            self.entries, self._length = _parse_manifest(self.path)
        else:
            self._length = 0
        try:
            self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
            os.ftruncate(self._descriptor, self._length)
            os.lseek(self._descriptor, 0, os.SEEK_END)
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def append(self, entry: Mapping[str, Any]) -> None:
        """Add one line; the file is as before if it cannot be written (``InputError``)."""
        line = json.dumps(dict(entry), allow_nan=False).encode("ascii") + b"\n"
        try:
            written = 0
            while written < len(line):
                written += os.write(self._descriptor, line[written:])
        except OSError as error:
            os.ftruncate(self._descriptor, self._length)
            os.lseek(self._descriptor, self._length, os.SEEK_SET)
            raise cannot_write(self.path, error) from error
        self._length += len(line)

    def close(self) -> None:
        """Synchronise to the disk and close; a second call does nothing."""
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def __enter__(self) -> ManifestWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_manifest(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a manifest as dictionaries; an incomplete last line is left out.

    Raises:
        InputError: no such file, or a line that is no JSON object.
    """
    return _parse_manifest(Path(path))[0]


def prepare_output(
    folder: str | os.PathLike[str],
    resume: bool = False,
    overwrite: bool = False,
    offers: Sequence[str] = ("resume", "overwrite"),
) -> Path:
    """Make ``folder`` ready to be written into and mark it as ours with the hidden file ``.sage_fast.json``.

    A new folder or one without visible files (but ``cache/``) is taken as it is. A folder with files is refused, unless ``resume``
    (it must hold our marker, a manifest, a bundle or run configs; nothing is deleted) or ``overwrite`` (it must hold
    our marker and only files of the kinds this package writes; its contents but ``cache/`` are deleted, links are not followed).

    Args:
        offers: which of the two the caller's own caller can ask for; a refusal advises no other.
    Raises:
        InputError: the folder is refused or cannot be made.
    """
    folder = Path(folder)
    visible = check_output(folder, resume, overwrite, offers)
    make_output(folder)
    if visible and overwrite:
        _empty(folder)
    if not (visible and resume) and not (folder / MARKER).exists():
        write_json(folder / MARKER, {"made_by": "sage_fast"})
    return folder


def make_output(folder: str | os.PathLike[str], what: str = "Output folder") -> Path:
    """Make a folder and those around it, where they are not there; ``what`` begins the sentence of a refusal.

    Raises:
        InputError: the system refuses.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{what} {str(folder)!r} cannot be made ({error.strerror}); give another folder.") from error
    return folder


def check_output(
    folder: str | os.PathLike[str],
    resume: bool = False,
    overwrite: bool = False,
    offers: Sequence[str] = ("resume", "overwrite"),
) -> list[str]:
    """Refuse what ``prepare_output`` refuses, and change nothing; returns the names of what is in the folder."""
    folder = Path(folder)
    if (scheme := scheme_of(folder)) is not None:
        raise InputError(
            f"Output {str(folder)!r} reads like a URL ({scheme}), which 'generate' alone writes to; give a folder."
        )
    if resume and overwrite:
        raise InputError("--resume and --overwrite exclude each other; give one of them.")
    try:
        visible = [name for name in os.listdir(folder) if not name.startswith(".") and name != CACHE]
    except FileNotFoundError:
        return []
    except OSError as error:
        if folder.is_file():
            raise InputError(f"Output {str(folder)!r} is a file; give a folder.") from error
        raise InputError(
            f"Output folder {str(folder)!r} cannot be made ({error.strerror}); give another folder."
        ) from error
    if visible and overwrite:
        _check_own(folder)
    elif visible and not resume:
        ways = {"resume": "--resume to go on in it, ", "overwrite": "--overwrite to replace its contents, "}
        advice = "".join(ways[name] for name in offers)
        raise InputError(
            f"Output folder {str(folder)!r} is not empty; {f'add {advice}or ' if offers else ''}give another folder."
        )
    elif visible and not any((folder / sign).exists() for sign in _RESUMABLE):
        raise InputError(
            f"Output folder {str(folder)!r} holds nothing to resume (no manifest, bundle or configs); "
            "give the folder of the earlier run or an empty one."
        )
    return visible


def scheme_of(path: str | os.PathLike[str]) -> str | None:
    """``"s3:"`` of what reads like a URL, as a path too (``s3:/bucket``) and is no file or folder that is there; else None."""
    found = re.match(r"[a-z][a-z0-9+.-]+:(?=/|$)", Path(path).as_posix())
    return found[0] if found and not os.path.lexists(path) else None


def check_apart(
    out: str | os.PathLike[str],
    inputs: Mapping[str, str | os.PathLike[str]],
    models: Iterable[str | os.PathLike[str] | None] = (),
) -> None:
    """Refuse an output folder that could be taken for input later, or whose emptying could delete what is read.

    Args:
        inputs: what is read (``"the shots"``) -> its folder; neither may lie in the other.
        models: files or folders that may not lie in ``out``; None is passed over.
    Raises:
        InputError: they do.
    """
    out = Path(out).resolve()
    for name, folder in inputs.items():
        folder = Path(folder).resolve()
        if out == folder or out in folder.parents or folder in out.parents:
            raise InputError(f"Output folder {str(out)!r} and {name} in {str(folder)!r} overlap; give another folder.")
    for model in models:
        if model is not None and (out == Path(model).resolve() or out in Path(model).resolve().parents):
            raise InputError(f"Output folder {str(out)!r} holds the model {str(model)!r}; give another folder.")


def _check_own(folder: Path) -> None:
    """Refuse a folder that holds what this package did not make."""
    if not (folder / MARKER).is_file():
        raise InputError(
            f"Output folder {str(folder)!r} was not made by sage_fast (no {MARKER} in it), so nothing in it is deleted; "
            "empty it yourself or give another folder."
        )
    for parent, folders, files in os.walk(folder):
        if Path(parent) == folder and CACHE in folders:
            folders.remove(CACHE)
        foreign = [name for name in files if not _is_own(os.path.join(parent, name))]
        foreign += [name for name in folders if os.path.islink(os.path.join(parent, name))]
        if foreign:
            raise InputError(
                f"Output folder {str(folder)!r} holds {os.path.join(parent, foreign[0])!r}, which sage_fast did not "
                "write, so nothing in it is deleted; move that file away or give another folder."
            )


def _empty(folder: Path) -> None:
    try:
        for entry in sorted(folder.iterdir(), key=lambda path: path.name == MARKER):  # the marker goes last
            if entry.name in (CACHE, LOCK):
                continue  # the lock is held by who empties the folder
            if entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink()
    except OSError as error:
        raise InputError(
            f"Output folder {str(folder)!r} cannot be emptied ({error.strerror}); empty it yourself."
        ) from error


def _is_own(path: str) -> bool:
    known = path.lower().endswith(_OWN_SUFFIXES + SHELL_FILES)
    return known or _OWN_NAMES.fullmatch(path.replace(os.sep, "/")) is not None


def cannot_write(path: Path | str, error: OSError, resumable: bool = False) -> InputError:
    """The sentence for a file that the system refuses to write."""
    remedy = write_remedy(error, resumable)
    return InputError(f"File {str(path)!r} cannot be written ({error.strerror or error}); {remedy}.")


def write_remedy(error: OSError, resumable: bool) -> str:
    """What to do when the system refuses to write.

    Args:
        resumable: a run that goes on with ``--resume`` writes there, in a folder that was there when it began.
    """
    if not resumable:
        remedies = {errno.ENOENT: "make its folder first"} | dict.fromkeys(
            _FULL, "free some space or choose another folder"
        )
        return remedies.get(error.errno or 0, "choose another place")
    gone = "its folder is gone, perhaps with a mount: bring it back"
    remedies = {errno.ENOENT: gone} | dict.fromkeys(_FULL, "free some space")
    remedy = remedies.get(error.errno or 0, "choose another place, or mend this one")
    return f"{remedy}, and the same command with --resume goes on"


def _parse_manifest(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Entries of the whole lines, and the number of bytes that those lines take."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise InputError(f"Manifest {str(path)!r} cannot be read ({error.strerror}).") from error
    entries, length = [], 0
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last line feed is incomplete
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if not isinstance(entry, dict):
            if number == len(lines) - 1 and lines[-1] == b"":
                break
            raise InputError(f"Manifest {str(path)!r}, line {number}, is no JSON object; repair or remove the file.")
        entries.append(entry)
        length += len(line) + 1
    return entries, length


def _to_pillow(image: torch.Tensor | np.ndarray) -> Image.Image:
    pixels = image.detach().cpu().numpy() if torch.is_tensor(image) else np.asarray(image)
    if pixels.dtype != np.uint8:
        raise TypeError(f"image must be uint8, got {pixels.dtype}; to_uint8 converts from [-1, 1].")
    if pixels.ndim != 3 or pixels.shape[0] not in _MODES or 0 in pixels.shape:
        raise InputError(f"image must have shape [C, H, W] with C = 1 to 4, got {list(pixels.shape)}.")
    pixels = pixels[0] if pixels.shape[0] == 1 else pixels.transpose(1, 2, 0)
    return Image.fromarray(np.ascontiguousarray(pixels))


def _place(
    n: int, columns: int, labels: Sequence[str] | None, width: int, height: int
) -> tuple[list[tuple[int, int]], list[tuple[str, int]], int]:
    """Corners of the cells, (name, top) of the bands of text, and where the last row ends."""
    cells: list[tuple[int, int]] = []
    bands: list[tuple[str, int]] = []
    top, column = _GAP, 0
    for i in range(n):
        new_section = labels is not None and (i == 0 or labels[i] != labels[i - 1])
        if i > 0 and (column == columns or new_section):
            top, column = top + height, 0
        if labels is not None and new_section:
            bands.append((labels[i], top))
            top += _BAND
        cells.append((_GAP + column * width, top))
        column += 1
    return cells, bands, top + height - _GAP


def _fitting(name: str, width: int, draw: ImageDraw.ImageDraw, font: Any) -> str:
    """``name`` in characters that the default font has, cut to ``width`` pixels."""
    text = " ".join("".join(map(_drawable, unicodedata.normalize("NFC", name))).split())
    if draw.textlength(text, font=font) <= width:
        return text
    while text and draw.textlength(text + "...", font=font) > width:
        text = text[:-1]
    return text + "..." if text else ""


def _drawable(sign: str) -> str:
    """``sign`` in ASCII, of which Pillow's own font has every letter: without its accents, else its number, as ``[4E2D]``."""
    plain = "".join(part for part in unicodedata.normalize("NFKD", sign) if not unicodedata.combining(part))
    return plain if plain and plain.isascii() else f"[{ord(sign):04X}]"
