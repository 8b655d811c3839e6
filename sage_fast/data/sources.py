"""One way to open a labelled data set, whatever it lies in; nothing is decoded and nothing unpacked.

Sources: a folder ``<category>/<image>.png``; a .zip or .tar (.gz, .xz, .bz2) of one; WebDataset shards (a folder of .tar
files, or a pattern such as ``shards-{0000..0003}.tar``); ``images.safetensors`` as ``generate`` writes it, or its folder; a data
set of Hugging Face's, or an object that feels like one. Each
becomes an ``ImageFolder``, so reading, splits and shots know no difference. The order is always the same: categories sorted by
name, images sorted by name within each.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from PIL import Image
from safetensors import SafetensorError, safe_open

from sage_fast.data.archives import Member, list_members, read_members
from sage_fast.data.folders import ImageFolder, Item, check_count, scan_image_folder
from sage_fast.data.images import IMAGE_SUFFIXES, UnreadableImage
from sage_fast.data.shards import TEXTS, Sample, class_names, expand_pattern, samples_of
from sage_fast.data.writers import scheme_of
from sage_fast.errors import InputError

__all__ = ["LabelledDataset", "Source", "open_source"]

_TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2")
_ARRAYS = "images.safetensors"
_MAX_NAME = 120  # characters of a category's name


class LabelledDataset(Protocol):
    """What is asked of a data set object: ``ds[i] -> {"image": PIL.Image or bytes, "label": int or str}``.

    Names of the labels are ``ds.features["label"].names``, where there are any. ``ds["label"]``, where it works, gives all
    labels without the images.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


Source: TypeAlias = str | os.PathLike[str] | LabelledDataset


def open_source(data: Source, min_categories: int = 1, flat_ok: bool = False) -> ImageFolder:
    """List a labelled data set.

    Args:
        data: folder, archive, folder in an archive (``a.zip/train``), folder of shards, pattern of shards, .safetensors file or
            its folder, or a data set object (see the module).
        min_categories: fewer are refused.
        flat_ok: take a folder or archive of images without categories as one category that bears its name.

    Raises:
        InputError: nothing of the kind, no images, no labels, an empty shard, names that fall together, or fewer than
            ``min_categories`` categories.
    """
    if not isinstance(data, str | os.PathLike):
        return _open_dataset(data, min_categories)
    path = Path(data)
    if path.is_dir():
        if shards := _packed_in(path, _TAR_SUFFIXES):
            return _open_shards(path, shards, min_categories)
        if path / _ARRAYS in _packed_in(path, (_ARRAYS,)):
            return _open_arrays(path / _ARRAYS, min_categories)
        return scan_image_folder(path, min_categories, flat_ok)
    archive = next((outer for outer in (path, *path.parents) if outer.is_file()), None)
    if archive == path and path.suffix == ".safetensors":
        return _open_arrays(path, min_categories)
    if archive is not None:
        return _open_archive(archive, path.relative_to(archive).as_posix(), min_categories, flat_ok)
    if any(c in str(data) for c in "{*?["):
        return _open_shards(path, expand_pattern(str(data)), min_categories)
    if (scheme := scheme_of(data)) is not None:
        raise InputError(
            f"Data {str(data)!r} reads like a URL ({scheme}), and is read from files of this machine alone; copy it here first."
        )
    raise InputError(f"Data {str(data)!r} does not exist; give a folder of images, a .zip or .tar, or shards.")


def _packed_in(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """The files with one of the suffixes in a folder that has no folders of images."""
    try:
        shown = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
        shards = [path for path in shown if path.name.lower().endswith(suffixes) and path.is_file()]
        inner = (file for path in shown if shards and path.is_dir() for file in path.iterdir())
        return [] if any(file.name.lower().endswith(IMAGE_SUFFIXES) for file in inner) else shards
    except OSError:  # scan_image_folder says what is wrong
        return []


def _open_archive(path: Path, inside: str, min_categories: int, flat_ok: bool) -> ImageFolder:
    """A folder of categories in an archive, named (``inside``, else ``.``) or in folders around it, or one shard."""
    members = list_members(path, TEXTS)
    if inside != ".":
        within = [member for member in members if member.name.startswith(f"{inside}/")]
        if not within:
            places = sorted({member.name.rsplit("/", 2)[0] for member in members if member.name.count("/") > 1})
            advice = f"give {str(path / places[0])!r}, which has images" if places else f"give {str(path)!r} alone"
            raise InputError(f"Archive {str(path)!r} has no folder {inside!r}; {advice}.")
        members = [member._replace(name=member.name[len(inside) + 1 :]) for member in within]
    if any(member.suffix == ".cls" for member in members) or _labelled_by_json(members):
        return _of_samples(path, samples_of(path, members), (path,), min_categories)
    images = [member for member in members if member.name.lower().endswith(IMAGE_SUFFIXES)]
    outer = _outer_folders([member.name.split("/") for member in images])
    named = [(member.name.split("/")[outer:], member) for member in images]
    found = [(parts[0], "/".join(parts), member) for parts, member in named if len(parts) == 2]
    if not found and flat_ok:
        name = (path / inside).name.split(".")[0]
        found = [(name, parts[0], member) for parts, member in named if len(parts) == 1]
    if not found:
        raise _no_categories(path / inside, images)
    return _listing(path / inside, found, (path,), min_categories, f"Archive {str(path / inside)!r}")


def _no_categories(where: Path, images: list[Member]) -> InputError:
    deep = next((where / member.name for member in images if member.name.count("/") > 1), None)
    remedy = f"give {str(deep.parents[1])!r}, which has some" if deep else "archive a folder of images per category"
    return InputError(
        f"Archive {str(where)!r} has no images of the form <category>/<image>.png, .jpg or another image type; {remedy}."
    )


def _labelled_by_json(members: list[Member]) -> bool:
    """Whether each image has a .json of the same key, and the first one's holds a label."""
    labels = {member.key: member.text for member in members if member.suffix == ".json"}
    images = [member.key for member in members if member.suffix in IMAGE_SUFFIXES]
    first = labels.get(images[0], "") if images else ""
    return set(images) <= labels.keys() and ('"label"' in first or '"cls"' in first)


def _outer_folders(names: list[list[str]]) -> int:
    """How many folders lie around those of the categories: all images share them and some lie deeper than a category."""
    depth = 0
    while any(len(name) > depth + 2 for name in names) and len({name[depth] for name in names}) == 1:
        names = [name for name in names if len(name) > depth + 1]
        depth += 1
    return depth


def _open_shards(root: Path, paths: list[Path], min_categories: int) -> ImageFolder:
    samples = [sample for path in paths for sample in samples_of(path, list_members(path, TEXTS))]
    return _of_samples(root, samples, tuple(paths), min_categories)


def _of_samples(root: Path, samples: list[Sample], paths: tuple[Path, ...], min_categories: int) -> ImageFolder:
    where = f"Data set {str(root)!r}"
    categories = _categories(class_names(samples, paths[0].parent), where)
    found = [(categories[sample.label], _file_of(sample, categories), sample.image) for sample in samples]
    return _listing(root, found, paths, min_categories, where)


def _file_of(sample: Sample, categories: dict[str, str]) -> str:
    shard = sample.image.archive.name.split(".")[0]
    return f"{categories[sample.label]}/{shard}/{sample.image.name}"


def _listing(
    root: Path, found: list[tuple[str, str, Member]], archives: tuple[Path, ...], min_categories: int, where: str
) -> ImageFolder:
    """(category, file, member) in order, without doubles."""
    found = sorted(found, key=lambda entry: entry[:2])
    files = [file for _, file, _ in found]
    _check_unique(files, where)
    names = sorted({category for category, _, _ in found})
    check_count(where, names, min_categories)
    number = {name: i for i, name in enumerate(names)}
    reader = read_members({file: member for _, file, member in found})
    return ImageFolder(root, names, files, [number[category] for category, _, _ in found], reader, archives)


def _open_arrays(path: Path, min_categories: int) -> ImageFolder:
    """``images`` uint8 [N, C, R, R], ``labels`` and ``indices`` int64 [N], and the names ``categories`` in the metadata."""
    try:
        with safe_open(path, "numpy") as file:
            names = json.loads(file.metadata()["categories"])
            rows = list(zip(file.get_tensor("labels").tolist(), file.get_tensor("indices").tolist(), strict=True))
            n, channels, *_ = file.get_slice("images").get_shape()
            right = n == len(rows) > 0 and channels in (1, 2, 3, 4) and file.get_slice("images").get_dtype() == "U8"
        listed = [(names[label], f"{names[label]}/{index:08d}", i) for i, (label, index) in enumerate(rows)]
    except (SafetensorError, KeyError, IndexError, TypeError, ValueError, OSError):
        right = False
    where = f"Data set {str(path)!r}"
    if not right:
        raise InputError(f"{where} holds no images with labels as generate writes them, or is damaged; make it again.")
    listed.sort()
    _check_unique([file for _, file, _ in listed], where)
    categories = sorted({name for name, _, _ in listed})
    check_count(where, categories, min_categories)
    number = {name: i for i, name in enumerate(categories)}
    files, labels = [file for _, file, _ in listed], [number[name] for name, _, _ in listed]
    return ImageFolder(
        path, categories, files, labels, _array_reader(path, {file: i for _, file, i in listed}), (path,)
    )


def _array_reader(path: Path, place: dict[str, int]) -> Callable[[Sequence[str]], Generator[Item, None, None]]:
    def read(files: Sequence[str]) -> Generator[Item, None, None]:
        with safe_open(path, "numpy") as opened:
            images = opened.get_slice("images")
            for i in sorted(range(len(files)), key=lambda i: place[files[i]]):
                row = place[files[i]]
                pixels = images[row : row + 1][0]
                yield i, Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0).copy())

    return read


def _open_dataset(data: LabelledDataset, min_categories: int) -> ImageFolder:
    if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        raise InputError(
            f"data must be a path or a data set with len(data) and data[i], got {type(data).__name__}; "
            "save a streamed data set first."
        )
    version = str(getattr(data, "_fingerprint", ""))
    where = f"Data set {version or type(data).__name__!r}"
    labels = _labels_of(data, where)
    categories = _categories(_label_names(data, labels, where), where)
    found = sorted((categories[label], f"{categories[label]}/{i:08d}", i) for i, label in enumerate(labels))
    names = sorted(set(categories.values()))
    check_count(where, names, min_categories)
    number = {name: i for i, name in enumerate(names)}
    files, numbers = [file for _, file, _ in found], [number[category] for category, _, _ in found]
    reader = _dataset_reader(data, {file: i for _, file, i in found})
    return ImageFolder(Path(version or type(data).__name__), names, files, numbers, reader, (), version)


def _labels_of(data: LabelledDataset, where: str) -> list[str]:
    """The labels, as a column where the data set has columns: a row would decode its image."""
    if isinstance(data, Mapping):
        raise InputError(f"{where} is a mapping of data sets, {', '.join(map(repr, data)):.120}; give one of them.")
    try:
        labels = list(data["label"])  # type: ignore[index, call-overload]
    except Exception:  # how an object says that it has no columns is its own affair
        labels = [row.get("label") if isinstance(row := data[i], Mapping) else None for i in range(len(data))]
    wrong = [i for i, label in enumerate(labels) if isinstance(label, bool) or not isinstance(label, Integral | str)]
    if wrong or len(labels) != len(data):
        at = (wrong or [0])[0]
        found = f", but {labels[at]!r:.60}" if at < len(labels) and labels[at] is not None else ""
        raise InputError(
            f"{where} has no label, an integer or a name, at {at}{found}; name its columns 'image' and 'label', and leave its "
            "rows as they are, without a format or transform."
        )
    if not labels:
        raise InputError(f"{where} is empty; give one with images.")
    return [str(label) for label in labels]


def _label_names(data: LabelledDataset, labels: list[str], where: str) -> dict[str, str]:
    """label -> name."""
    features = getattr(data, "features", None)
    feature = features.get("label") if isinstance(features, Mapping) else None
    names = getattr(feature, "names", None)
    if names is None:
        return {label: label for label in labels}
    numbers = {str(number): str(name) for number, name in enumerate(names)}
    unnamed = sorted(set(labels) - set(numbers))
    if unnamed:
        raise InputError(f"{where} has {len(numbers)} names of labels and a label {unnamed[0]}; leave such images out.")
    return {label: numbers[label] for label in labels}


def _dataset_reader(
    data: LabelledDataset, place: dict[str, int]
) -> Callable[[Sequence[str]], Generator[Item, None, None]]:
    def read(files: Sequence[str]) -> Generator[Item, None, None]:
        for i in sorted(range(len(files)), key=lambda i: place[files[i]]):
            try:
                image = data[place[files[i]]]["image"]
            except Exception as error:  # the data set's own decoder, met with a damaged image
                yield i, UnreadableImage(files[i], f"the data set does not give it ({type(error).__name__})")
                continue
            if isinstance(image, Mapping):  # Image(decode=False) of Hugging Face
                image = image.get("bytes") or image.get("path")
            if isinstance(image, bytes | str | Image.Image):
                yield i, image
            else:
                yield (
                    i,
                    UnreadableImage(files[i], f"expected an image of Pillow's or bytes, got {type(image).__name__}"),
                )

    return read


def _categories(classes: dict[str, str], where: str) -> dict[str, str]:
    """label -> name of its class, as it can be that of a folder; no two labels share one."""
    names = {label: _plain(name, where) for label, name in classes.items()}
    double = [name for name, count in Counter(names.values()).items() if count > 1]
    if double:
        clash = " and ".join(f"{label} ({classes[label]!r})" for label, name in names.items() if name == double[0])
        raise InputError(f"{where} has classes {clash}, which both have the name {double[0]!r}; rename one.")
    return names


def _plain(label: str, where: str) -> str:
    name = "".join("_" if c in "/\\" or ord(c) < 32 else c for c in label.strip())
    name = "_" + name[1:] if name.startswith(".") else name
    if not name or len(name) > _MAX_NAME:
        raise InputError(
            f"{where} has a class {label[:40]!r}, expected a name of 1 to {_MAX_NAME} characters; rename it."
        )
    return name


def _check_unique(files: list[str], where: str) -> None:
    double = next((a for a, b in zip(files, files[1:]) if a == b), None)
    if double is not None:
        raise InputError(f"{where} holds {double!r} more than once; keep one image of each name.")
