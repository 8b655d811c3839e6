"""What a shard looks like in the output: image files in folders, a tar file, or a piece of one safetensors file.

Each format has the same words. ``store`` makes the bytes of one image, on any thread; ``open`` begins a shard, whose
images are then added in their order; what is closed is whole. ``read`` gives the stored bytes back, ``taken`` says how many an
image takes in the output. ``contents`` is what ``store`` takes: pixels, or files where the encoder works on the device that
drew them.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any, BinaryIO, cast

import numpy as np
from PIL import Image
from torch import Tensor

from sage_fast.data.writers import cannot_write
from sage_fast.generation.encoding import Encoder, to_host, with_provenance
from sage_fast.generation.plan import Plan
from sage_fast.generation.stores import STATE, Store

__all__ = [
    "ArrayFile", "Content", "Format", "ImageFolders", "OpenShard", "Stored", "TarFiles", "choose_format", "read_only",
]  # fmt: skip

Content = np.ndarray | bytes
"""An image as ``store`` takes it: pixels as the format has them, or a finished file, without provenance."""

_PROVENANCE = ("category", "index", "source", "seed", "method", "alpha", "fusion", "preset", "model")
_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
_BLOCK = 1 << 22  # bytes copied at a time


@dataclass(frozen=True)
class Stored:
    """One image as it is kept: the file (or the tar's member) it lies in, its size and SHA-256, and perhaps its bytes."""

    position: int
    file: str
    size: int
    sha256: str
    data: bytes
    about: dict[str, Any]


class OpenShard:
    """A shard that is being written to ``file``; on an error nothing of it stays."""

    def __init__(self, file: str, add: Callable[[Stored], None] | None, stack: ExitStack) -> None:
        self._file, self._add, self._stack = file, add, stack

    def add(self, image: Stored) -> None:
        """The next image of the shard.

        Raises:
            InputError: the disk takes no more.
        """
        if self._add is not None:
            try:
                self._add(image)
            except OSError as error:
                raise cannot_write(self._file, error, resumable=True) from error

    def close(self) -> None:
        """The shard is whole."""
        self._stack.close()

    def abort(self, error: BaseException) -> None:
        """Nothing of the shard stays."""
        with suppress(BaseException):
            self._stack.__exit__(type(error), error, error.__traceback__)


def _for_encoder(images: np.ndarray, encoder: Encoder) -> np.ndarray:
    """uint8 [n, C, R, R] to [n, R, R, C] with colours in the encoder's order, or [n, R, R] of one channel."""
    if images.shape[1] == 1:
        return images[:, 0]
    if encoder.bgr:
        images = images[:, [2, 1, 0, 3][: images.shape[1]]]
    return np.ascontiguousarray(images.transpose(0, 2, 3, 1))


def _contents(images: Tensor | list[bytes], encoder: Encoder) -> Sequence[Content]:
    """Drawn images, uint8 [n, C, R, R] on any device, or files of them, one by one as ``store`` takes them."""
    if isinstance(images, Tensor):
        images = to_host(encoder, images)
    return images if isinstance(images, list) else list(_for_encoder(images.numpy(), encoder))


def _encoded(encoder: Encoder, content: Content, about: dict[str, Any]) -> bytes:
    """An image file that says what it is. The package's version is left to the manifest: bytes are the plan's alone."""
    shown = {key: about[key] for key in _PROVENANCE}
    data = content if isinstance(content, bytes) else encoder.encode(content)
    return with_provenance(data, encoder.image, {"synthetic": True} | shown)


def _decoded(data: bytes, n_channels: int) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        pixels = np.asarray(image if image.mode == _MODES[n_channels] else image.convert(_MODES[n_channels]))
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


class ImageFolders:
    """``<category>/<category>_00000.png``: an image is there before its shard is; it counts when its shard does."""

    separate = True  # a shard can be replaced after the end
    labelled = False  # a shard's files hold no numbers of categories

    def __init__(self, store: Store, plan: Plan, encoder: Encoder, shape: tuple[int, int, int]) -> None:
        self.target, self.plan, self.encoder, self.shape = store, plan, encoder, shape
        self._made: set[str] = set()

    def file(self, category: str, index: int) -> str:
        """Name of an image's file."""
        return f"{category}/{category}_{index:05d}.{self.encoder.image}"

    def listed(self, position: int, category: str, index: int) -> str:
        """Name of an image in the manifest."""
        return self.file(category, index)

    def contents(self, images: Tensor | list[bytes]) -> Sequence[Content]:
        """Drawn images, uint8 [n, C, R, R] on any device, or files of them, one by one as :meth:`store` takes them."""
        return _contents(images, self.encoder)

    def decode(self, data: bytes) -> np.ndarray:
        """Stored bytes as uint8 [C, R, R]."""
        return _decoded(data, self.shape[0])

    def encoded(self, content: Content, about: dict[str, Any]) -> bytes:
        """The bytes of an image's file."""
        return _encoded(self.encoder, content, about)

    def store(self, position: int, content: Content, about: dict[str, Any]) -> Stored:
        """Encode an image and put it into its place."""
        category, data = about["category"], self.encoded(content, about)
        if category not in self._made:
            self.target.make_folder(category)
            self._made.add(category)
        file = self.file(category, about["index"])
        self.target.place(file, data, position)
        return Stored(position, file, len(data), hashlib.sha256(data).hexdigest(), b"", about)

    def taken(self, image: Stored) -> int:
        """Bytes that an image takes in the output."""
        return image.size

    def open(self, shard: int) -> OpenShard:
        """Nothing is to be begun: images go to their places by themselves."""
        return OpenShard("", None, ExitStack())

    def holds(self, shard: int, images: Iterable[Stored]) -> bool:
        """Whether all but the images is as it must be: there is nothing else."""
        return True

    def is_missing(self, shard: int) -> bool:
        """Whether a file of a shard is gone or empty; asked on this machine alone, where it is quick."""
        if not self.target.local:
            return False
        images = self.plan.images(self.plan.positions(shard))
        return not all(self.target.size(self.file(part.category, index)) for part, index in images)

    def read(self, shard: int, wanted: Container[int] | None = None) -> Iterator[tuple[int, bytes]]:
        """Position and bytes of each image of a shard, or of those that are wanted."""
        positions = self.plan.positions(shard)
        for position, (part, index) in zip(positions, self.plan.images(positions)):
            if wanted is None or position in wanted:
                yield position, self.target.read(self.file(part.category, index))

    def finish(self) -> None:
        """Nothing is left to do."""

    def files(self) -> Iterator[str]:
        """Every name in the output that belongs to an image: the folders."""
        yield from self.plan.categories


class TarFiles:
    """``shard-000000.tar`` as WebDataset reads them: .png (.jpg, .webp), .cls and .json under one number each."""

    separate = True
    labelled = True

    def __init__(self, store: Store, plan: Plan, encoder: Encoder, shape: tuple[int, int, int]) -> None:
        self.target, self.plan, self.encoder, self.shape = store, plan, encoder, shape

    def file(self, shard: int) -> str:
        """Name of a shard's file."""
        return f"shard-{shard:06d}.tar"

    def listed(self, position: int, category: str, index: int) -> str:
        """Name of an image in the manifest."""
        return f"{self.file(position // self.plan.shard)}/{position:09d}.{self.encoder.image}"

    def contents(self, images: Tensor | list[bytes]) -> Sequence[Content]:
        """Drawn images, uint8 [n, C, R, R] on any device, or files of them, one by one as :meth:`store` takes them."""
        return _contents(images, self.encoder)

    def decode(self, data: bytes) -> np.ndarray:
        """Stored bytes as uint8 [C, R, R]."""
        return _decoded(data, self.shape[0])

    def store(self, position: int, content: Content, about: dict[str, Any]) -> Stored:
        """Encode an image."""
        data = _encoded(self.encoder, content, about)
        file = self.listed(position, about["category"], about["index"])
        return Stored(position, file, len(data), hashlib.sha256(data).hexdigest(), data, about)

    def taken(self, image: Stored) -> int:
        """Bytes that an image takes in the output, with its label and its description: each a header and whole blocks."""
        sizes = (image.size, len(self._label(image)), len(_described(image)))
        return sum(tarfile.BLOCKSIZE - (-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE for size in sizes)

    def open(self, shard: int) -> OpenShard:
        """Begin a tar file."""
        stack = ExitStack()
        return self._begin(shard, stack.enter_context(self.target.writer(self.file(shard))), stack)

    def _begin(self, shard: int, file: BinaryIO, stack: ExitStack) -> OpenShard:
        tar = stack.enter_context(tarfile.open(fileobj=file, mode="w|", format=tarfile.USTAR_FORMAT))

        def add(image: Stored) -> None:
            parts = {self.encoder.image: image.data, "cls": self._label(image), "json": _described(image)}
            for suffix, data in parts.items():
                member = tarfile.TarInfo(f"{image.position:09d}.{suffix}")  # time 0, no owner: bytes of the plan alone
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))

        return OpenShard(f"{self.target}/{self.file(shard)}", add, stack)

    def _label(self, image: Stored) -> bytes:
        return str(self.plan.labels[image.about["category"]]).encode()

    def holds(self, shard: int, images: Iterable[Stored]) -> bool:
        """Whether the file is what these images make, between them too."""
        wanted, found = _Hash(), _Hash()
        open_shard = self._begin(shard, cast(BinaryIO, wanted), ExitStack())
        for image in images:
            open_shard.add(image)
        open_shard.close()
        with self.target.reader(self.file(shard)) as file:
            while block := file.read(_BLOCK):
                found.write(block)
        return wanted.sha256.digest() == found.sha256.digest()

    def is_missing(self, shard: int) -> bool:
        """Whether the file is gone or empty."""
        return not self.target.size(self.file(shard))

    def read(self, shard: int, wanted: Container[int] | None = None) -> Iterator[tuple[int, bytes]]:
        """Position and bytes of each image of a shard, or of those that are wanted."""
        with self.target.reader(self.file(shard)) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                name, _, suffix = member.name.partition(".")
                if suffix == self.encoder.image and (wanted is None or int(name) in wanted):
                    content = tar.extractfile(member)
                    yield int(name), content.read() if content is not None else b""

    def finish(self) -> None:
        """Nothing is left to do."""

    def files(self) -> Iterator[str]:
        """Every name in the output that belongs to an image: the tar files."""
        return (self.file(shard) for shard in range(self.plan.n_shards))


def _described(image: Stored) -> bytes:
    return json.dumps(image.about).encode()


class _Hash:
    """A file that is not kept."""

    def __init__(self) -> None:
        self.sha256 = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        return len(data)


class ArrayFile:
    """``images.safetensors``: ``images`` uint8 [N, C, R, R], ``labels`` and ``indices`` int64 [N], in the plan's order."""

    separate = False
    labelled = False  # its pieces; labels are written when they are joined
    name = "images.safetensors"
    encoder: Encoder | None = None

    def __init__(self, store: Store, plan: Plan, shape: tuple[int, int, int]) -> None:
        self.target, self.plan, self.shape = store, plan, shape
        self._bytes = int(np.prod(shape))

    def piece(self, shard: int) -> str:
        """Name of a shard's pixels until all are there."""
        return f"{STATE}/pieces/{shard:08d}.u8"

    def listed(self, position: int, category: str, index: int) -> str:
        """Name of an image in the manifest: that of the file."""
        return self.name

    def contents(self, images: Tensor | list[bytes]) -> Sequence[Content]:
        """Drawn images, uint8 [n, C, R, R] on any device, one by one as they are."""
        return images if isinstance(images, list) else list(images.cpu().numpy())

    def decode(self, data: bytes) -> np.ndarray:
        """Stored bytes as uint8 [C, R, R]."""
        return np.frombuffer(data, np.uint8).reshape(self.shape)

    def store(self, position: int, content: Content, about: dict[str, Any]) -> Stored:
        """The image's bytes [C, R, R]."""
        data = content if isinstance(content, bytes) else content.tobytes()
        return Stored(position, self.name, len(data), hashlib.sha256(data).hexdigest(), data, about)

    def taken(self, image: Stored) -> int:
        """Bytes that an image takes in the output, with its label and its index."""
        return image.size + 16

    def open(self, shard: int) -> OpenShard:
        """Begin a piece."""
        stack = ExitStack()
        file = stack.enter_context(self.target.writer(self.piece(shard)))

        def add(image: Stored) -> None:
            file.write(image.data)

        return OpenShard(f"{self.target}/{self.piece(shard)}", add, stack)

    def holds(self, shard: int, images: Iterable[Stored]) -> bool:
        """Whether all but the images is as it must be: size, header, and the shard's labels and indices; of a piece its size."""
        if self.target.size(self.piece(shard)) is not None:
            return not self.is_missing(shard)
        start = 8 * self.plan.positions(shard).start
        with self.target.reader(self.name) as file:
            found = [file.read(len(self._header))]
            for column, numbers in enumerate(self._numbers(shard)):
                file.seek(len(self._header) + 8 * column * len(self.plan) + start)
                found.append(file.read(len(numbers)))
        return found == [self._header, *self._numbers(shard)] and not self.is_missing(shard)

    def is_missing(self, shard: int) -> bool:
        """Whether neither the piece nor the whole is there in its full size."""
        piece = len(self.plan.positions(shard)) * self._bytes
        whole = len(self._header) + len(self.plan) * (16 + self._bytes)
        return self.target.size(self.piece(shard)) != piece and self.target.size(self.name) != whole

    def read(self, shard: int, wanted: Container[int] | None = None) -> Iterator[tuple[int, bytes]]:
        """Position and bytes of each image of a shard, or of those that are wanted."""
        positions, joined = self.plan.positions(shard), self.target.size(self.piece(shard)) is None
        first = len(self._header) + 16 * len(self.plan) + positions.start * self._bytes if joined else 0
        with self.target.reader(self.name if joined else self.piece(shard)) as file:
            for number, position in enumerate(positions):
                if wanted is None or position in wanted:
                    file.seek(first + number * self._bytes)
                    yield position, file.read(self._bytes)

    def finish(self) -> None:
        """Join the pieces."""
        with self.target.writer(self.name) as out:
            out.write(self._header)
            for column in (0, 1):
                for shard in range(self.plan.n_shards):
                    out.write(self._numbers(shard)[column])
            for shard in range(self.plan.n_shards):
                with self.target.reader(self.piece(shard)) as piece:
                    while block := piece.read(_BLOCK):
                        out.write(block)

    def files(self) -> Iterator[str]:
        """Every name in the output that belongs to an image: the file."""
        yield self.name

    @cached_property
    def _header(self) -> bytes:
        n, ends = len(self.plan), [8 * len(self.plan), 16 * len(self.plan), (16 + self._bytes) * len(self.plan)]
        content = {
            "__metadata__": {"categories": json.dumps(self.plan.categories), "made_by": "sage_fast"},
            "labels": {"dtype": "I64", "shape": [n], "data_offsets": [0, ends[0]]},
            "indices": {"dtype": "I64", "shape": [n], "data_offsets": ends[:2]},
            "images": {"dtype": "U8", "shape": [n, *self.shape], "data_offsets": ends[1:]},
        }
        text = json.dumps(content).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def _numbers(self, shard: int) -> tuple[bytes, bytes]:
        """Labels and indices of a shard, int64."""
        images = self.plan.images(self.plan.positions(shard))
        numbers = np.array([(self.plan.labels[part.category], index) for part, index in images], "<i8")
        return numbers[:, 0].tobytes(), numbers[:, 1].tobytes()


Format = ImageFolders | TarFiles | ArrayFile


def choose_format(name: str, store: Store, plan: Plan, encoder: Encoder | None, shape: tuple[int, int, int]) -> Format:
    """The format of a name; ``encoder`` is that of image files, None: arrays; ``shape`` [C, R, R] that of an image."""
    if encoder is None:
        return ArrayFile(store, plan, shape)
    return (ImageFolders if name == "folder" else TarFiles)(store, plan, encoder, shape)


def read_only(name: str, image: str) -> Encoder:
    """Stands for the encoder of an output that is only read."""

    def encode(pixels: np.ndarray) -> bytes:
        raise NotImplementedError(f"the output was opened to be read, not for {name} to encode")

    return Encoder(name, image, False, encode)
