"""Seen and unseen categories, and the few shots of an unseen one.

The shots of a category are the first K of its images in an order that depends on the seed, the category's name and
the images' file names alone (SHA-256 of the three). So one shot is contained in three, a category's shots do not change
when other categories or images come and go, and no library's random numbers are involved.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeVar

from sage_fast.data.folders import ImageFolder, ImageSet
from sage_fast.data.images import UnreadableImage
from sage_fast.data.writers import MARKER, cannot_write, check_apart, prepare_output, write_json
from sage_fast.errors import InputError, SageFastWarning, counted

Images = TypeVar("Images", ImageFolder, ImageSet)


@dataclass(frozen=True)
class Split:
    """Names of the categories to learn from (``seen``) and to be generated from a few shots (``unseen``)."""

    name: str
    seen: tuple[str, ...]
    unseen: tuple[str, ...]


def load_split(path: str | os.PathLike[str]) -> Split:
    """Read a split file: JSON with lists ``seen`` and ``unseen`` of category names (other keys are free).

    Raises:
        InputError: no such file, no JSON, a list missing or empty, a name given twice.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"Split file {str(path)!r} cannot be opened ({error.strerror}).") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"Split file {str(path)!r} is not JSON ({error}); expected lists seen and unseen.") from error
    seen, unseen = (_names(content, key) for key in ("seen", "unseen"))
    if not seen or not unseen:
        raise InputError(f"Split file {str(path)!r} must hold two lists of category names, seen and unseen.")
    repeated = [name for name, count in Counter(seen + unseen).items() if count > 1]
    if repeated:
        raise InputError(f"Split file {str(path)!r} names {repeated[0]!r} more than once; name each category once.")
    name = content.get("name")
    return Split(name if isinstance(name, str) else Path(path).stem, tuple(seen), tuple(unseen))


def _names(content: object, key: str) -> list[str]:
    """The list of names under ``key``, empty when there is none."""
    names = content.get(key) if isinstance(content, dict) else None
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else []


def split_seen_unseen(images: Images, split: Split) -> tuple[Images, Images]:
    """The seen and the unseen part of an ``ImageFolder`` or ``ImageSet``; categories of neither list are left out.

    Raises:
        InputError: a category of the split is not there.
    """
    return images.select(split.seen), images.select(split.unseen)


def draw_split(categories: Sequence[str], n_unseen: int | None = None, seed: int = 0) -> Split:
    """Choose unseen categories by the seed and the names alone.

    Args:
        categories: all names.
        n_unseen: how many; None: a tenth, at least one.
        seed: any integer.

    Raises:
        InputError: fewer than one unseen or two seen categories.
    """
    n = max(1, round(len(categories) / 10)) if n_unseen is None else n_unseen
    if not 1 <= n <= len(categories) - 2:
        raise InputError(
            f"n_unseen must leave at least two of {counted(len(categories), 'category')} seen and one unseen, got {n}."
        )
    texts = {name: f"{seed}\0unseen\0{name}".encode("utf-8", "surrogateescape") for name in categories}
    order = sorted(categories, key=lambda name: (hashlib.sha256(texts[name]).digest(), name))
    return Split("drawn", tuple(sorted(order[n:])), tuple(sorted(order[:n])))


def write_split(
    images: ImageFolder, split: Split, out: str | os.PathLike[str], n_shots: int = 3, seed: int = 0
) -> dict[str, int]:
    """Copy images, byte for byte, to ``seen``, ``shots`` and ``real`` in a new folder, each ``<category>/<image>``.

    ``shots`` has the given images of each unseen category (:func:`take_shots`), ``real`` its others; ``split.json`` is
    the split. What is learned or generated from is not to be compared with: images with the very bytes of one in ``seen`` or
    ``shots`` are left out of ``real``, with a warning.

    Returns:
        The number of images in each of the three.

    Raises:
        InputError: a category of the split is not there or has no image left for ``real``, ``out`` is not empty, or an
            image is no file.
    """
    seen, unseen = split_seen_unseen(images, split)
    shots, real = take_shots(unseen, n_shots, seed)
    _check_left(unseen, set(real.labels), n_shots)
    check_apart(out, {"the images": images.root})
    folder = prepare_output(out, offers=())
    parts = {"seen": seen, "shots": shots, "real": real}
    written: dict[str, list[tuple[int, bytes]]] = {}
    try:
        for name, part in parts.items():
            known = {digest for rows in written.values() for _, digest in rows}
            written[name] = _copy(part, folder / name, known if name == "real" else set())
        _check_left(unseen, {label for label, _ in written["real"]}, n_shots)
    except BaseException:  # nothing half-written
        for name in parts:
            shutil.rmtree(folder / name, ignore_errors=True)
        if not any(name != MARKER for name in os.listdir(folder)):
            (folder / MARKER).unlink(missing_ok=True)
        raise
    write_json(folder / "split.json", {"name": split.name, "seen": split.seen, "unseen": split.unseen})
    if copies := len(real) - len(written["real"]):
        warnings.warn(
            f"Left out of real/: {counted(copies, 'image')} of unseen categories, with the bytes of one in seen/ or shots/.",
            SageFastWarning,
            stacklevel=2,
        )
    return {name: len(rows) for name, rows in written.items()}


def _check_left(unseen: ImageFolder, labels: set[int], n_shots: int) -> None:
    """Raise InputError unless each category has an image among those with ``labels``."""
    if lacking := set(unseen.categories) - {unseen.categories[label] for label in labels}:
        raise InputError(
            f"No image of {min(lacking)!r} is left beside its {counted(n_shots, 'shot')}; take fewer shots."
        )


def _copy(images: ImageFolder, folder: Path, known: set[bytes]) -> list[tuple[int, bytes]]:
    """Write the images, without those whose SHA-256 is known; label and SHA-256 of each that was written."""
    written = []
    for i, content in images.contents():
        category, *rest = images.categories[images.labels[i]], *PurePosixPath(images.files[i]).parts[1:]
        target = folder / category / "_".join(rest)
        if isinstance(content, Path) and not content.is_file():  # a pipe would be waited at for ever
            content = UnreadableImage(content, "not a regular file")
        if not isinstance(content, Path | bytes):
            why = content.reason if isinstance(content, UnreadableImage) else "pixels, and no file to copy"
            raise InputError(f"{str(images.root)!r} cannot be split at {images.files[i]!r}: {why}; give other images.")
        data = content if isinstance(content, bytes) else content.read_bytes()
        digest = hashlib.sha256(data).digest()
        if digest in known:
            continue
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
        except OSError as error:
            raise cannot_write(target, error) from error
        written.append((images.labels[i], digest))
    return written


def take_shots(images: Images, k: int, seed: int = 0) -> tuple[Images, Images]:
    """K images of each category as the given shots, all others as the real ones to compare with.

    Args:
        images: ``ImageFolder`` or ``ImageSet``.
        k: shots per category, at least 1.
        seed: any integer; the same one gives the same shots on every machine.

    Returns:
        (shots, real). Both keep ``categories`` and the label numbers; ``real`` is empty of a category with K images.

    Raises:
        InputError: ``k`` is below 1 or a category has fewer images.
    """
    if k < 1:
        raise InputError(f"The number of shots must be at least 1, got {k}.")
    labels = [int(label) for label in images.labels]
    by_category: list[list[int]] = [[] for _ in images.categories]
    for index, label in enumerate(labels):
        by_category[label].append(index)
    shots: list[int] = []
    for category, indices in zip(images.categories, by_category):
        if len(indices) < k:
            raise InputError(
                f"Category {category!r} has fewer images ({len(indices)}) than shots ({k}); "
                "add images or ask for fewer shots."
            )
        shots += _shuffled(category, indices, images.files, seed)[:k]
    chosen = set(shots)
    return images.subset(shots), images.subset([i for i in range(len(labels)) if i not in chosen])


def hold_out(images: Images, share: float = 0.05, most: int = 2000, seed: int = 0) -> tuple[Images, Images]:
    """Images to train on, and a share that training never shows, to measure against; no trainer sees the second part.

    Which images are held out depends on the seed and on the categories' and files' names, so the same folder gives the
    same part on every machine and in every continuation.

    Args:
        images: ``ImageFolder`` or ``ImageSet``.
        share: of the images to hold out, between 0 and 1.
        most: held-out images at most.
        seed: any integer.

    Returns:
        (training, held out), both in the order of ``images``.

    Raises:
        InputError: a share that is none, or that leaves one part empty.
    """
    n = min(most, round(share * len(images)))
    if not 0 < share < 1 or not 0 < n < len(images):
        raise InputError(
            f"share must be between 0 and 1 and leave images in both parts, got {share} of {len(images)} images, at most {most}."
        )
    names = [f"{images.categories[int(c)]}\0{PurePosixPath(f).name}" for c, f in zip(images.labels, images.files)]
    texts = [f"{seed}\0held out\0{name}".encode("utf-8", "surrogateescape") for name in names]
    order = sorted(range(len(texts)), key=lambda i: (hashlib.sha256(texts[i]).digest(), i))
    return images.subset(sorted(order[n:])), images.subset(sorted(order[:n]))


def _shuffled(category: str, indices: Sequence[int], files: Sequence[str], seed: int) -> list[int]:
    def key(index: int) -> tuple[bytes, int]:
        text = f"{seed}\0{category}\0{PurePosixPath(files[index]).name}"
        return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest(), index

    return sorted(indices, key=key)
