"""The folder of a bundle: its files, written all or none, and read only when their sha256 is right.

A bundle is a folder: ``bundle.json`` (format, version, what each network was built with, sha256 of every file) beside
``generator.safetensors``, ``encoder.safetensors``, ``dictionary.safetensors`` (``directions`` [L, D, K]) and
``codes.safetensors`` (a ``LatentTable``), optionally ``discriminator.safetensors``; a bundle of networks alone, as a conversion
makes it, lacks dictionary and codes. No file holds code, and none is read before its sha256 is found right.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from sage_fast.data.latent_table import LatentTable
from sage_fast.data.writers import atomic_write, make_output
from sage_fast.errors import InputError, reason_of
from sage_fast.models.checkpoints import path_of
from sage_fast.models.encoder_kinds import encoder_architecture
from sage_fast.models.encoders import PyramidEncoder
from sage_fast.models.image_encoder import ImageEncoder
from sage_fast.models.published_parts import own_state
from sage_fast.models.stylegan2 import Discriminator, Generator

__all__ = [
    "Directions", "StrPath", "bundle_directions", "bundle_folder", "bundle_hash", "bundle_tensors",
    "check_parts", "load_bundle_codes", "read_bundle_file", "read_index", "save_bundle",
]  # fmt: skip

StrPath = str | os.PathLike[str]

_FORMAT, _VERSION, _INDEX = "sage_fast.bundle", 1, "bundle.json"
_SHIPPED = Path(__file__).parents[1] / "model"
_NEEDED = ("generator.safetensors", "encoder.safetensors", "dictionary.safetensors", "codes.safetensors")
_NOISES = ("none", "const")
_STORAGE = (torch.float32, torch.float16)


class Directions(NamedTuple):
    """A dictionary as stored: ``directions`` float32 [L, D, K]; ``groups`` of layers that share a code, or None."""

    directions: Tensor
    groups: tuple[tuple[int, ...], ...] | None


def save_bundle(
    folder: StrPath,
    *,
    generator: Generator,
    encoder: ImageEncoder,
    directions: Tensor | None = None,
    codes: LatentTable | StrPath | None = None,
    groups: Sequence[Sequence[int]] | None = None,
    discriminator: Discriminator | None = None,
    noise: str = "none",
    about: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a bundle into ``folder`` (made when absent); other files there stay. Equal parts give equal bytes.

    All files are written before the first one takes its name, so a full disk leaves an older bundle as it was.

    Args:
        directions: A, [L, D, K]; None: a bundle of networks alone, which edits nothing (``load_bundle`` says so).
        codes: the table of latents, or the file it was saved in; None as ``directions``.
        groups: the groups of layers that share a code.
        noise: the generator's noise the encoder was trained for, ``"none"`` or ``"const"``.
        about: training command, losses, ...: anything JSON can hold.
        dtype: how weights and latents are stored, ``torch.float32`` or ``torch.float16`` (half the size);
            ``latent_avg`` is float32 always.
    Raises:
        InputError: parts that do not belong together, a value that ``dtype`` cannot hold, or a file that cannot be
            written.
    """
    if dtype not in _STORAGE:
        raise InputError(f"dtype must be torch.float32 or torch.float16, got {dtype}.")
    if noise not in _NOISES:
        raise InputError(f"noise must be 'none' or 'const', the encoder's setting in training, got {noise!r}.")
    table = codes if isinstance(codes, LatentTable | None) else LatentTable.load(codes)
    check_parts(generator, encoder, directions, table, "The parts of the bundle")
    networks: dict[str, nn.Module] = {"generator": generator, "encoder": encoder}
    if discriminator is not None:
        networks["discriminator"] = discriminator
    content = {f"{name}.safetensors": _state_bytes(name, network, dtype) for name, network in networks.items()}
    if directions is not None:
        content["dictionary.safetensors"] = _tensor_bytes("dictionary", {"directions": directions}, dtype)
    folder = make_output(folder, "Model folder")
    if table is not None:
        content["codes.safetensors"] = _table_bytes(table, folder, dtype)
    index = {
        "format": _FORMAT,
        "version": _VERSION,
        "resolution": generator.resolution,
        "n_channels": generator.n_channels,
        "noise": noise,
        "groups": None if groups is None else [[int(layer) for layer in group] for group in groups],
        "networks": {name: _architecture(network) for name, network in networks.items()},
        "about": dict(about or {}),
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in sorted(content.items())},
    }
    _write_all(folder, content, index)
    return folder


def load_bundle_codes(path: StrPath | None = None) -> LatentTable:
    """The codes of the seen images of a bundle folder. Raises as :func:`load_generator`."""
    folder = bundle_folder(path)
    read_bundle_file(folder, "codes.safetensors")
    return LatentTable.load(folder / "codes.safetensors")


def read_bundle_file(folder: StrPath | None, name: str) -> bytes:
    """The bytes of one file of a bundle, its sha256 checked.

    Raises:
        InputError: the bundle does not list the file, or it is missing, truncated or changed.
    """
    folder = bundle_folder(folder)
    expected = read_index(folder)["files"].get(name)
    if expected is None:
        keep = (
            ", which train and train-dictionary keep with --bundle.discriminator (--resume adds it to a finished run)"
        )
        judge = keep if name.startswith("discr") else ""
        raise InputError(f"Model folder {str(folder)!r} has no {name}{judge}; train that part or give another model.")
    try:
        data = (folder / name).read_bytes()
    except OSError as error:
        remedy = "check its permissions" if isinstance(error, PermissionError) else "copy the whole bundle again"
        raise InputError(f"Model file {str(folder / name)!r} cannot be read ({error.strerror}); {remedy}.") from error
    if hashlib.sha256(data).hexdigest() != expected:
        raise InputError(
            f"Model file {str(folder / name)!r} is truncated or changed: its sha256 is not the one in {_INDEX}; "
            "copy the whole bundle again."
        )
    return data


def bundle_folder(path: StrPath | None) -> Path:
    folder = _SHIPPED if path is None else path_of(path)
    if not folder.exists():
        remedy = "build it with sage-fast train and give its folder" if path is None else "give the folder of a bundle"
        raise InputError(f"Model {str(folder)!r} does not exist; {remedy}.")
    if not folder.is_dir():
        raise InputError(f"Model {str(folder)!r} is a file, expected the folder of a bundle; give that folder.")
    return folder


def read_index(path: StrPath | None) -> dict[str, Any]:
    """The content of a bundle's ``bundle.json``, every entry present and of the right type. Raises as :func:`load_generator`."""
    folder = bundle_folder(path)
    path = folder / _INDEX
    if not path.is_file():
        begun = (folder / "checkpoints").is_dir()
        remedy = (
            "finish its training, train-dictionary last" if begun else "give a folder that sage-fast train has finished"
        )
        raise InputError(f"Model folder {str(folder)!r} has no {_INDEX}; {remedy}.")
    try:
        index = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(
            f"Model file {str(path)!r} is truncated or damaged ({reason_of(error)}); copy the bundle again."
        ) from error
    if not isinstance(index, dict) or index.get("format") != _FORMAT:
        raise InputError(f"File {str(path)!r} is not of a model of sage_fast; give a folder that has one.")
    if index.get("version") != _VERSION:
        raise InputError(
            f"Model {str(folder)!r} has version {index.get('version')!r}, expected {_VERSION}; "
            "use the sage_fast it was made with or train it again."
        )
    wrong = [key for key in ("files", "networks", "about") if not isinstance(index.get(key), dict)]
    wrong += [key for key in ("noise",) if index.get(key) not in _NOISES]
    wrong += [key for key in ("groups",) if not isinstance(index.get(key, 0), list | None)]
    if wrong:
        raise InputError(f"Model file {str(path)!r} is damaged (entry {wrong[0]!r}); copy the bundle again.")
    return index


def _architecture(network: nn.Module) -> dict[str, Any]:
    """What rebuilds a network; of an encoder its kind too."""
    if isinstance(network, ImageEncoder):
        return encoder_architecture(network)
    assert isinstance(network, Generator | Discriminator)
    return network.architecture()


def bundle_directions(folder: Path, index: dict[str, Any]) -> Directions:
    directions = bundle_tensors(folder, "dictionary.safetensors").get("directions")
    if directions is None or directions.ndim != 3:
        raise InputError(f"Model {str(folder)!r} has no directions [L, D, K] in dictionary.safetensors; train them.")
    groups = index["groups"]
    return Directions(directions, None if groups is None else tuple(tuple(group) for group in groups))


def bundle_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """Tensors of one file of the bundle, floats as float32."""
    data = read_bundle_file(folder, name)
    try:
        return {key: t.float() if t.is_floating_point() else t for key, t in from_bytes(data).items()}
    except SafetensorError as error:
        raise InputError(
            f"Model file {str(folder / name)!r} is no safetensors file ({reason_of(error)}); copy the bundle again."
        ) from error


def _state_bytes(name: str, network: nn.Module, dtype: torch.dtype) -> bytes:
    return _tensor_bytes(name, own_state(network), dtype)


def _tensor_bytes(name: str, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> bytes:
    """A safetensors file; floats are stored as ``dtype``, but ``latent_avg`` as float32: every latent rests on it."""
    stored = {}
    for key, tensor in tensors.items():
        kept = torch.float32 if key == "latent_avg" else dtype
        tensor = tensor.detach().cpu()
        stored[key] = (tensor.to(kept) if tensor.is_floating_point() else tensor).contiguous().clone()
        if not bool(torch.isfinite(stored[key]).all()):
            raise InputError(f"{name} holds values in {key!r} that {kept} cannot hold; use float32 or train it again.")
    return to_bytes(stored, metadata={"sage_fast": name})


def _table_bytes(table: LatentTable, folder: Path, dtype: torch.dtype) -> bytes:
    with tempfile.TemporaryDirectory(prefix=".", dir=folder) as scratch:
        table.save(Path(scratch) / "codes.safetensors", dtype)
        return (Path(scratch) / "codes.safetensors").read_bytes()


def _write_all(folder: Path, content: Mapping[str, bytes], index: Mapping[str, Any]) -> None:
    """Write every file under a temporary name, then rename all of them, the index last."""
    text = json.dumps(index, indent=2, sort_keys=True, allow_nan=False) + "\n"
    with ExitStack() as files:
        for name, data in {_INDEX: text.encode("utf-8"), **content}.items():  # left in reverse order: the index last
            file = files.enter_context(atomic_write(folder / name))
            file.write(data)
            file.flush()


def bundle_hash(index: Mapping[str, Any]) -> str:
    shaping: dict[str, Any] = {key: index[key] for key in ("noise", "groups")}
    shaping["networks"] = {name: index["networks"][name] for name in ("generator", "encoder")}
    shaping["files"] = {name: index["files"][name] for name in _NEEDED}
    return hashlib.sha256(json.dumps(shaping, sort_keys=True).encode()).hexdigest()


def check_parts(
    generator: Generator, encoder: ImageEncoder, directions: Tensor | None, codes: LatentTable | None, where: str
) -> None:
    """Raise InputError unless the parts of a model have one number and width of styles and the networks one image size."""
    latents = (generator.n_latent, generator.style_dim)
    other_size = isinstance(encoder, PyramidEncoder) and encoder.resolution != generator.resolution
    if (encoder.n_latent, encoder.style_dim) != latents or other_size:
        raise InputError(
            f"{where}: the generator has {generator.resolution} px and styles {list(latents)}, the encoder "
            f"{encoder.resolution} px and {[encoder.n_latent, encoder.style_dim]}; use networks trained together."
        )
    if encoder.n_channels != generator.n_channels:
        channels = f"{generator.n_channels} image channels, the encoder {encoder.n_channels}"
        raise InputError(f"{where}: the generator has {channels}; use networks trained together.")
    shapes = {
        "directions": None if directions is None else directions.shape[:-1],
        "codes": None if codes is None else codes.w_plus.shape[1:],
    }
    for name, shape in shapes.items():
        if shape is not None and tuple(shape) != latents:
            raise InputError(
                f"{where}: {name} are for styles {list(shape)}, the generator at {generator.resolution} px has "
                f"{list(latents)}; embed and train the dictionary with this generator."
            )
