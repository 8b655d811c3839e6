"""A folder of images per category, listed (``ImageFolder``) and read into memory (``ImageSet``).

Archives and other sources are listed as ``ImageFolder`` too: see :mod:`sage_fast.data.sources`.
"""

from __future__ import annotations

import os
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image

from sage_fast.data.images import (
    IMAGE_SUFFIXES,
    Content,
    SmallImage,
    UnreadableImage,
    check_pixels,
    decode,
    shorter_side,
)
from sage_fast.errors import InputError, SageFastWarning, counted

_NAMED = 3  # how many files or categories a message lists before "and N more"
_CHUNK, _CHUNK_BYTES = 32, 2**23  # images a thread takes at a time; fewer when they are large
#: (place among the files asked for, what ``decode`` takes or why there is nothing)
Item: TypeAlias = tuple[int, Content | UnreadableImage]
#: asked for files by name, yields each, in whichever order the source is read fastest
Reader = Callable[[Sequence[str]], Generator[Item, None, None]]


@dataclass(frozen=True, eq=False)
class ImageFolder:
    """The image files of a folder, or of an archive or data set that holds one, not yet read.

    Attributes:
        root: the folder, or the archive, pattern or name of the data set.
        categories: names, sorted by code point.
        files: N paths relative to ``root`` with ``/`` (``category/name.png``, or ``name.png`` in a flat folder),
            category after category, sorted by name within each.
        labels: N indices into ``categories``.
        reader: how the files are read; None: they lie in ``root``.
        archives: the files that hold the images; None: each image is a file of its own.
        version: what changes with the content, for a data set that is no file.
    """

    root: Path
    categories: list[str]
    files: list[str]
    labels: list[int]
    reader: Reader | None = None
    archives: tuple[Path, ...] | None = None
    version: str = ""

    def __len__(self) -> int:
        return len(self.files)

    def subset(self, indices: Sequence[int]) -> ImageFolder:
        """The files at ``indices``, in that order; ``categories`` and labels keep their numbers."""
        return replace(self, files=[self.files[i] for i in indices], labels=[self.labels[i] for i in indices])

    def select(self, categories: Sequence[str]) -> ImageFolder:
        """The files of ``categories`` only; labels are renumbered in sorted order."""
        names = _known(categories, self.categories, f"Folder {str(self.root)!r}")
        place = {name: new for new, name in enumerate(names)}
        number = {old: place[name] for old, name in enumerate(self.categories) if name in place}
        kept = [i for i, label in enumerate(self.labels) if label in number]
        part = self.subset(kept)
        return replace(part, categories=names, labels=[number[label] for label in part.labels])

    def contents(self) -> Generator[Item, None, None]:
        """(i, what ``decode`` takes, or why there is nothing) for each of the N images, not always in their order."""
        if self.reader is None:
            yield from ((i, self.root / file) for i, file in enumerate(self.files))
        else:
            yield from self.reader(self.files)


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images of one resolution, in memory or in a file that is mapped into it (read only).

    Attributes:
        images: uint8 [N, C, R, R].
        labels: int64 [N], indices into ``categories``.
        categories: S names, sorted.
        files: N names, relative to ``root``.
        skipped: "file: reason" for each image that could not be read.
        root: the folder the files lie in; empty for drawn images.
    """

    images: torch.Tensor
    labels: torch.Tensor
    categories: list[str]
    files: list[str]
    skipped: list[str]
    root: str = ""

    def __len__(self) -> int:
        return len(self.files)

    def subset(self, indices: torch.Tensor | Sequence[int]) -> ImageSet:
        """The images at ``indices`` (numbers, or a mask), in that order; ``categories`` and labels keep their numbers."""
        index = torch.arange(len(self))[indices if torch.is_tensor(indices) else list(indices)]
        files = [self.files[i] for i in index.tolist()]
        return ImageSet(self.images[index], self.labels[index], self.categories, files, [], self.root)

    def select(self, categories: Sequence[str]) -> ImageSet:
        """The images of ``categories`` only; labels are renumbered in sorted order."""
        names = _known(categories, self.categories, "The image set")
        place = {name: new for new, name in enumerate(names)}
        number = torch.tensor([place.get(name, -1) for name in self.categories])
        part = self.subset(torch.nonzero(number[self.labels] >= 0).flatten())
        return replace(part, labels=number[part.labels], categories=names)


def scan_image_folder(folder: str | os.PathLike[str], min_categories: int = 1, flat_ok: bool = False) -> ImageFolder:
    """List the images of ``folder/<category>/*.png|jpg|...``.

    Each sub-folder with images is one category. Names that start with a dot, ``__MACOSX`` and files without an image
    suffix are passed over; sub-folders without images are passed over with one warning; links are followed. Images
    directly in ``folder`` count only when ``flat_ok`` and no sub-folder has images: they are then one category that
    bears the folder's name; beside sub-folders with images they are passed over with a warning. The contact sheet
    beside a manifest is none of them. Nothing is decoded.

    Raises:
        InputError: no such folder, no images, fewer than ``min_categories`` categories, or the folder of a model.
    """
    root = Path(folder)
    names, loose = _children(root)
    if (root / "bundle.json").is_file() or {"checkpoints", "configs"} <= set(names):
        raise InputError(f"{str(root)!r} is the folder of a model or its training; give a folder of images.")
    if (root / "manifest.jsonl").is_file():  # of generate: the sheet beside it is no image of a category
        loose = [name for name in loose if name != "contact_sheet.png"]
    listing = {name: _children(root / name)[1] for name in names}
    _warn_empty(root, [name for name, images in listing.items() if not images] if any(listing.values()) else [])
    listing = {name: images for name, images in listing.items() if images}
    if not listing:
        return _flat_folder(root, loose, names, min_categories, flat_ok)
    check_count(f"Image folder {str(root)!r}", list(listing), min_categories)
    if loose:
        where = f"Images of {str(root)!r} that lie in no category's folder are passed over"
        warnings.warn(f"{where}: {_first(loose)}.", SageFastWarning, stacklevel=2)
    files = [f"{name}/{image}" for name, images in listing.items() for image in images]
    labels = [label for label, images in enumerate(listing.values()) for _ in images]
    return ImageFolder(root, list(listing), files, labels)


def read_images(
    folder: ImageFolder,
    resolution: int,
    n_channels: int = 3,
    max_bad_share: float = 0.05,
    progress: Callable[[int, int], None] | None = None,
    upscale: bool = True,
) -> ImageSet:
    """Decode every image of ``folder`` by the rule of ``images`` into one array, in the folder's order.

    Args:
        folder: what ``scan_image_folder`` or ``sources.open_source`` returned.
        resolution: R in pixels.
        n_channels: 1 grey, 2 grey + alpha, 3 RGB, 4 RGBA.
        max_bad_share: images that cannot be read are left out with one warning while they are at most this share.
        progress: called with (images done, images in all) from the calling thread.
        upscale: False refuses a resolution above the shorter side of any image.

    Raises:
        InputError: more than ``max_bad_share`` of the images, or all images of one category, cannot be read; an image
            is too small; or the array does not fit into memory.
    """
    check_pixels(resolution, n_channels)
    images = _room_for(len(folder), n_channels, resolution)
    out = images.numpy()
    bad = decode_all(folder, out.__setitem__, resolution, n_channels, upscale, progress)
    check_bad(folder, bad, max_bad_share)
    return image_set(folder, images if not bad else images[kept(folder, bad)], bad)


def kept(folder: ImageFolder, bad: dict[int, str]) -> list[int]:
    """The places of the images that could be read."""
    return [i for i in range(len(folder)) if i not in bad]


def image_set(folder: ImageFolder, images: torch.Tensor, bad: dict[int, str]) -> ImageSet:
    """The images [N, C, R, R] that could be read, with their names and labels."""
    skipped = [f"{folder.files[i]}: {reason}" for i, reason in sorted(bad.items())]
    readable = folder.subset(kept(folder, bad)) if bad else folder
    labels = torch.tensor(readable.labels, dtype=torch.int64)
    return ImageSet(images, labels, list(folder.categories), list(readable.files), skipped, str(folder.root))


def _room_for(n: int, n_channels: int, resolution: int) -> torch.Tensor:
    try:
        return torch.empty((n, n_channels, resolution, resolution), dtype=torch.uint8)
    except RuntimeError as error:
        size = n * n_channels * resolution**2 / 2**30
        raise InputError(
            f"{n} images of {resolution} pixels need {size:.1f} GiB of memory, which is not there; "
            "choose a smaller resolution or fewer images."
        ) from error


def decode_all(
    folder: ImageFolder,
    store: Callable[[int, np.ndarray], object],
    resolution: int,
    n_channels: int,
    upscale: bool,
    progress: Callable[[int, int], None] | None,
) -> dict[int, str]:
    """Decode the images on all cores and hand each to ``store`` (its place, uint8 [C, R, R]) in one of the threads.

    Pillow decodes and resizes without holding Python's lock, so threads serve. The calling thread reads what lies in
    archives, a few chunks ahead.

    Returns:
        Reasons by place of the images that cannot be read.
    """

    def work(chunk: list[Item]) -> tuple[int, dict[int, str]]:
        bad = {}
        for i, content in chunk:
            try:
                if isinstance(content, UnreadableImage):
                    raise content
                store(i, decode(content, resolution, n_channels, folder.files[i], upscale))
            except SmallImage:
                raise
            except UnreadableImage as error:
                bad[i] = error.reason
        return len(chunk), bad

    bad: dict[int, str] = {}
    done, n_threads = 0, _n_threads()
    waiting: deque[Future[tuple[int, dict[int, str]]]] = deque()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")  # each image is judged here, once and by name
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        pool = ThreadPoolExecutor(n_threads, thread_name_prefix="sage_fast-decode")
        try:
            for chunk in _chunks(folder):
                if chunk:
                    waiting.append(pool.submit(work, chunk))
                while waiting and (len(waiting) > n_threads + 2 or not chunk):
                    n, found = waiting.popleft().result()
                    done += n
                    bad |= found
                    if progress is not None:
                        progress(done, len(folder))
        except SmallImage as error:
            raise _too_small(folder, resolution) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    return bad


def _chunks(folder: ImageFolder) -> Iterator[list[Item]]:
    """The contents, a few at a time; an empty list is the last."""
    chunk: list[Item] = []
    n_bytes = 0
    with closing(folder.contents()) as contents:
        for i, content in contents:
            chunk.append((i, content))
            n_bytes += len(content) if isinstance(content, bytes) else 0
            if len(chunk) == _CHUNK or n_bytes > _CHUNK_BYTES:
                yield chunk
                chunk, n_bytes = [], 0
    if chunk:
        yield chunk
    yield []


def _too_small(folder: ImageFolder, resolution: int) -> InputError:
    """Says how many images are smaller than ``resolution``, and up to which one none is."""
    sides: list[tuple[int, str]] = []
    with closing(folder.contents()) as contents:
        for i, content in contents:
            if not isinstance(content, UnreadableImage):
                try:
                    sides.append((shorter_side(content, folder.files[i]), folder.files[i]))
                except UnreadableImage:
                    continue
    smaller = [side for side, _ in sides if side < resolution]
    smallest, name = min(sides)
    return InputError(
        f"{len(smaller)} of {len(folder)} images in {str(folder.root)!r} are smaller than the resolution {resolution} "
        f"(the smallest, {name}, has {smallest} pixels on its shorter side); choose a resolution of at most {smallest}, "
        "leave small images out, or allow enlarging with upscale (--upscale)."
    )


def _n_threads() -> int:
    n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, n_cores)  # each holds one image at full size


def _children(folder: Path) -> tuple[list[str], list[str]]:
    """Sorted names of the sub-folders and of the image files in ``folder``."""
    try:
        with os.scandir(folder) as entries:
            shown = [entry for entry in entries if not entry.name.startswith(".") and entry.name != "__MACOSX"]
            folders = sorted(entry.name for entry in shown if entry.is_dir())
    except FileNotFoundError as error:
        raise InputError(f"Image folder {str(folder)!r} does not exist; give a folder of images.") from error
    except NotADirectoryError as error:
        raise InputError(f"{str(folder)!r} is a file; give the folder that holds the images.") from error
    except OSError as error:
        raise InputError(
            f"Image folder {str(folder)!r} cannot be listed ({error.strerror}); check its permissions."
        ) from error
    names = {entry.name for entry in shown if entry.name.lower().endswith(IMAGE_SUFFIXES)}
    return folders, sorted(names - set(folders))


def _flat_folder(root: Path, loose: list[str], names: list[str], min_categories: int, flat_ok: bool) -> ImageFolder:
    layout = f"expected {root.name or root}/<category>/<image>.png, .jpg or another image type"
    if not loose:
        inner = next(
            (name for name in names if any(_children(root / name / sub)[1] for sub in _subfolders(root, name))), ""
        )
        hint = f"give {str(root / inner)!r}, which has them" if inner else "put images there or give another folder"
        others = [] if inner else _other_files(root, names)
        seen = f" ({_first(others)} {'is' if len(others) == 1 else 'are'} of no type that is read)" if others else ""
        raise InputError(f"Image folder {str(root)!r} has no images{seen}, {layout}; {hint}.")
    if not flat_ok:
        raise InputError(
            f"Image folder {str(root)!r} has images but no category folders, {layout}; "
            "move the images of each category into a folder of their own."
        )
    category = Path(os.path.abspath(root)).name or "images"  # a link keeps its own name
    check_count(f"Image folder {str(root)!r}", [category], min_categories)
    return ImageFolder(root, [category], loose, [0] * len(loose))


def _other_files(root: Path, names: list[str]) -> list[str]:
    """Visible files in a folder and its sub-folders that are no images by their names."""
    found = [path for folder in (root, *(root / name for name in names)) for path in folder.iterdir()]
    shown = (path for path in found if path.is_file() and not path.name.startswith("."))
    return sorted(path.relative_to(root).as_posix() for path in shown if not path.name.lower().endswith(IMAGE_SUFFIXES))


def _subfolders(root: Path, name: str) -> list[str]:
    return _children(root / name)[0]


def check_count(where: str, categories: list[str], min_categories: int) -> None:
    """Raise ``InputError`` unless there are ``min_categories``; ``where`` begins the sentence."""
    if len(categories) < min_categories:
        raise InputError(
            f"{where} has {counted(len(categories), 'category')} "
            f"({_first(categories)}), expected at least {min_categories}; add a folder of images per category."
        )


def _warn_empty(root: Path, empty: list[str]) -> None:
    if empty:
        message = f"Sub-folders of {str(root)!r} without images are passed over: {_first(empty)}."
        warnings.warn(message, SageFastWarning, stacklevel=3)


def check_bad(folder: ImageFolder, bad: dict[int, str], max_bad_share: float) -> None:
    """Refuse too many unreadable images, or all of a category; warn of a few."""
    if not bad:
        return
    reasons = [f"{folder.files[i]}: {reason}" for i, reason in sorted(bad.items())]
    found = f"{len(bad)} of {len(folder)} images in {str(folder.root)!r} cannot be read ({_first(reasons, '; ')})"
    if len(bad) / len(folder) > max_bad_share:
        raise InputError(f"{found}, more than the {max_bad_share:.0%} allowed; repair or remove them.")
    counts = np.bincount(np.array(folder.labels)[kept(folder, bad)], minlength=len(folder.categories))
    lost = [name for name, count in zip(folder.categories, counts) if count == 0]
    if lost:
        raise InputError(
            f"No image can be read of {_first(lost)} in {str(folder.root)!r}; repair the images or remove the folder."
        )
    warnings.warn(f"{found} and are left out; repair or remove them.", SageFastWarning, stacklevel=3)


def _known(wanted: Sequence[str], present: Sequence[str], where: str) -> list[str]:
    names = sorted(set(wanted))
    missing = sorted(set(names) - set(present))
    if missing or not names:
        raise InputError(
            f"{where} lacks {_first(missing) or 'a chosen category'}; choose among {_first(list(present))}."
        )
    return names


def _first(names: Sequence[str], separator: str = ", ") -> str:
    more = f"{separator}and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return separator.join(repr(name)[1:-1] for name in names[:_NAMED]) + more
