"""Decoded images in one file that is mapped into memory, so that a large data set is decoded once and takes no RAM up front.

``DIR/sage_fast_cache.pixels`` is uint8 [M, C, R, R] and nothing else; ``sage_fast_cache.json`` beside it says what it was made
of (files, labels, categories, size and time of change of every file, resolution, channels, number of the rule), which images
could not be read, and the CRC-32 of every 4 MiB. Both are read whole each time they are opened; where anything does not agree,
the cache is made anew, with one warning that says why. A folder holds one cache.

One process builds, others wait for it. The lock is the kernel's (flock), so a killed process leaves none behind, and what it had
written is overwritten by the next. On a file system without such locks two that build at the same time are refused.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import shutil
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from sage_fast.data.folders import ImageFolder, ImageSet, check_bad, decode_all, image_set, kept, read_images
from sage_fast.data.images import RULE, check_pixels
from sage_fast.data.locks import taken, wait_for
from sage_fast.data.writers import atomic_write
from sage_fast.errors import InputError, SageFastWarning

__all__ = ["BUDGET", "IN_MEMORY", "cached_images", "read_or_map"]

BUDGET = 2**37  # bytes that a cache may take: 128 GiB
IN_MEMORY = 2**28  # bytes of pixels up to which none is made unless it is asked for
_PIXELS, _HEADER, _LOCK = "sage_fast_cache.pixels", "sage_fast_cache.json", "sage_fast_cache.lock"
_UNFINISHED = ".sage_fast_cache.pixels.sage_fast.tmp"
_FORMAT = 1
_BLOCK = 2**22  # bytes of a checksum
_SPARE = 2**28  # bytes of the disk that are left free
_REASONS = {
    "format": "it was made by another version",
    "rule": "the rule that images are decoded by has changed",
    "resolution": "it has another resolution",
    "n_channels": "it has another number of channels",
    "upscale": "it may hold enlarged images",
    "files": "the source has other images",
    "labels": "the source has other labels",
    "categories": "the source has other categories",
    "stamps": "a file of the source has changed",
    "version": "the data set has changed",
}


def read_or_map(
    folder: ImageFolder,
    resolution: int,
    n_channels: int,
    usual: Path | None = None,
    asked: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
    upscale: bool = True,
) -> ImageSet:
    """All images of ``folder``, in memory or mapped from a cache.

    Args:
        usual: where a cache is made of more than ``IN_MEMORY`` bytes; without room for it on the disk the images are
            read into memory, with one warning. None: in memory.
        asked: where a cache is made whatever the size; what stands in its way is an error then.
        progress, upscale: as in ``read_images``.
    """
    if asked is not None:
        cache: Path | None = Path(asked)
    elif usual is None or len(folder) * n_channels * resolution**2 <= IN_MEMORY:
        cache = None
    elif (usual / _HEADER).exists() or not (reason := no_room_for(folder, resolution, n_channels, usual)):
        cache = usual
    else:
        cache, message = None, f"The images are read into memory, not mapped from a cache in {str(usual)!r}: {reason}."
        warnings.warn(message, SageFastWarning, stacklevel=3)
    if cache is None:
        return read_images(folder, resolution, n_channels, progress=progress, upscale=upscale)
    return cached_images(folder, resolution, n_channels, cache, progress=progress, upscale=upscale)


def cached_images(
    folder: ImageFolder,
    resolution: int,
    n_channels: int,
    cache: Path,
    budget: int = BUDGET,
    max_bad_share: float = 0.05,
    progress: Callable[[int, int], None] | None = None,
    upscale: bool = True,
) -> ImageSet:
    """``read_images`` by way of the cache in the folder ``cache``, which is made when there is none that fits.

    Args:
        cache: folder of this cache alone; made when absent.
        budget: bytes that the cache may take.

    Returns:
        The images in their order; ``images`` is mapped from the file and must not be written to.

    Raises:
        InputError: as ``read_images``, or the cache exceeds ``budget``, the free disk, or cannot be written. An earlier
            cache that does not fit is gone then, and nothing half-written is left.
    """
    check_pixels(resolution, n_channels)
    wanted = _wanted(folder, resolution, n_channels, upscale)
    if (cache / _HEADER).exists():
        with _locked(cache, fcntl.LOCK_SH):
            found = _open(cache, folder, wanted)
        if isinstance(found, ImageSet):
            return found
    with _locked(cache, fcntl.LOCK_EX):
        found = _open(cache, folder, wanted)  # another process may have built it meanwhile
        if isinstance(found, ImageSet):
            return found
        if found:
            warnings.warn(f"The cache in {str(cache)!r} is made anew: {found}.", SageFastWarning, stacklevel=2)
        for name in (_HEADER, _PIXELS, _UNFINISHED):
            (cache / name).unlink(missing_ok=True)
        if reason := no_room_for(folder, resolution, n_channels, cache, budget):
            raise InputError(f"The cache in {str(cache)!r} cannot be made: {reason}.")
        _build(cache, folder, wanted, max_bad_share, progress)
        found = _open(cache, folder, wanted)
        assert isinstance(found, ImageSet), found
        return found


def no_room_for(folder: ImageFolder, resolution: int, n_channels: int, cache: Path, budget: int = BUDGET) -> str:
    """Why a cache of ``folder`` cannot be made in ``cache``, with the remedy, or an empty text."""
    n_bytes = len(folder) * n_channels * resolution**2
    if n_bytes > budget:
        return f"{len(folder)} images take {_size(n_bytes)}, more than the {_size(budget)} allowed; raise the budget"
    there = next(path for path in (cache, *cache.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if n_bytes + _SPARE > free:
        return f"{len(folder)} images take {_size(n_bytes)} and the disk has {_size(free)} free; give another folder"
    return ""


def _wanted(folder: ImageFolder, resolution: int, n_channels: int, upscale: bool) -> dict[str, Any]:
    """What a cache must say of itself to be taken."""
    paths = [folder.root / file for file in folder.files] if folder.archives is None else list(folder.archives)
    return {
        "format": _FORMAT,
        "rule": RULE,
        "resolution": resolution,
        "n_channels": n_channels,
        "upscale": upscale,
        "files": folder.files,
        "labels": folder.labels,
        "categories": folder.categories,
        "stamps": [_stamp(path) for path in paths],
        "version": folder.version,
    }


def _stamp(path: Path) -> list[int]:
    """Size and time of the last change in nanoseconds; -1 of what is not there, which reading will tell."""
    try:
        status = path.stat()
    except OSError:
        return [-1, -1]
    return [status.st_size, status.st_mtime_ns]


def _open(cache: Path, folder: ImageFolder, wanted: dict[str, Any]) -> ImageSet | str:
    """The images, or why there are none: an empty text where there is no cache."""
    if not (cache / _HEADER).exists():
        return ""
    header = _read_header(cache / _HEADER)
    if header is None:
        return "its description is damaged"
    for key, value in wanted.items():
        if header["made_of"].get(key) != value and not (key == "upscale" and value):  # allowed, not needed
            return _REASONS[key]
    bad = {int(i): reason for i, reason in header["bad"].items()}
    shape = (len(folder) - len(bad), wanted["n_channels"], wanted["resolution"], wanted["resolution"])
    try:
        if (cache / _PIXELS).stat().st_size != math.prod(shape):
            return "its pixels have another length than they should"
        if _checksums(cache / _PIXELS) != header["crc32"]:
            return "its pixels are damaged"
        return image_set(folder, _mapped(cache / _PIXELS, shape), bad)
    except OSError as error:
        return f"its pixels cannot be read ({error.strerror})"


def _mapped(path: Path, shape: tuple[int, ...]) -> torch.Tensor:
    """The file as a tensor that must not be written to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(np.memmap(path, np.uint8, "r", shape=shape))


def _read_header(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return content["header"] if content["crc32"] == _crc32_of(content["header"]) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _crc32_of(header: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(header, sort_keys=True).encode())


def _checksums(path: Path) -> list[int]:
    """CRC-32 of each block, read by two threads (without Python's lock) and not through the map, which would fill memory."""
    with path.open("rb") as file, ThreadPoolExecutor(2) as pool:
        starts = range(0, os.fstat(file.fileno()).st_size, _BLOCK)
        return list(pool.map(lambda start: zlib.crc32(os.pread(file.fileno(), _BLOCK, start)), starts))


def _build(
    cache: Path,
    folder: ImageFolder,
    wanted: dict[str, Any],
    max_bad_share: float,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Write both files; none of them is there when it fails."""
    n_channels, resolution = wanted["n_channels"], wanted["resolution"]
    size = n_channels * resolution**2
    try:
        with (cache / _UNFINISHED).open("w+b") as file:
            place = file.fileno()
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(place, 0, size * len(folder))  # a full disk shows now

            def store(i: int, pixels: np.ndarray) -> None:
                _write_at(place, pixels.tobytes(), i * size)

            bad = decode_all(folder, store, resolution, n_channels, wanted["upscale"], progress)
            check_bad(folder, bad, max_bad_share)
            for new, old in enumerate(kept(folder, bad) if bad else []):
                if new != old:
                    _write_at(place, os.pread(place, size, old * size), new * size)
            os.ftruncate(place, size * (len(folder) - len(bad)))
            if not _is_at(file, cache / _UNFINISHED):  # where the file system has no locks: another process builds too
                raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        crc32 = _checksums(cache / _UNFINISHED)
        os.replace(cache / _UNFINISHED, cache / _PIXELS)
    except OSError as error:
        raise InputError(
            f"The cache in {str(cache)!r} cannot be written ({error.strerror}); choose another folder."
        ) from error
    finally:
        (cache / _UNFINISHED).unlink(missing_ok=True)
    header = {"made_of": wanted, "bad": {str(i): reason for i, reason in sorted(bad.items())}, "crc32": crc32}
    with atomic_write(cache / _HEADER) as description:
        description.write(json.dumps({"header": header, "crc32": _crc32_of(header)}).encode())


def _write_at(descriptor: int, content: bytes, place: int) -> None:
    if os.pwrite(descriptor, content, place) != len(content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextmanager
def _locked(cache: Path, mode: int) -> Iterator[None]:
    """Hold the lock of the cache, shared to read or exclusive to build; folders made for a build that fails go with it."""
    new = [path for path in (cache, *cache.absolute().parents) if not path.exists()]
    file = _take_lock(cache, mode)
    try:
        yield
    except BaseException:
        if new:
            with suppress(OSError):  # another process may have put something there
                (cache / _LOCK).unlink()  # while it is held: who waits for it sees that it is gone
                for path in new:
                    path.rmdir()
        raise
    finally:
        if file is not None:
            file.close()


def _take_lock(cache: Path, mode: int) -> IO[str] | None:
    """The open, locked file; None where it cannot be written and is not needed. Says so when it has to wait."""
    while True:
        try:
            cache.mkdir(parents=True, exist_ok=True)
            file = (cache / _LOCK).open("a")
        except OSError as error:
            if mode == fcntl.LOCK_SH:  # nobody builds where nothing can be written
                return None
            raise InputError(
                f"The cache in {str(cache)!r} cannot be written ({error.strerror}); choose another folder."
            ) from error
        if not taken(file.fileno(), mode):
            print(f"sage_fast: waiting for another process to decode the images into {cache} ...", file=sys.stderr)
            wait_for(file.fileno(), mode)
        if _is_at(file, cache / _LOCK):
            return file
        file.close()  # a builder that failed took it away, and another may hold the next


def _is_at(file: IO[Any], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.2f} GiB"
