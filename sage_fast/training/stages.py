"""The road of training in one run folder: gan -> encoder -> embed -> dictionary -> bundle.

Each stage reads what it needs from the folder and leaves its own part there, so :func:`train_all` is the stages one
after the other, each can be run alone, and each resumes from its own checkpoint. A stage whose predecessor was trained
again refuses to go on: ``configs/lineage.json`` remembers which checkpoint each stage was trained from.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from sage_fast.data.folders import ImageSet
from sage_fast.data.latent_table import LatentTable
from sage_fast.data.pixel_cache import read_or_map
from sage_fast.data.sources import Source, open_source
from sage_fast.data.writers import CACHE, atomic_write, write_json
from sage_fast.editing.mapping import mapping_warning, usual_components
from sage_fast.errors import InputError, SageFastWarning
from sage_fast.factorization.category_irrelevant import CategoryIrrelevantDictionary, layer_groups
from sage_fast.factorization.category_relevant import CategoryRelevantDictionary
from sage_fast.models.encoder_kinds import build_encoder
from sage_fast.models.image_encoder import ImageEncoder
from sage_fast.models.perceptual import load_perceptual
from sage_fast.models.stylegan2 import Discriminator, Generator, n_latent_of
from sage_fast.models.weights import load_discriminator, load_generator, read_index, save_bundle
from sage_fast.training.checkpoints import read_state
from sage_fast.training.checks import check_encoder, check_road
from sage_fast.training.dictionary import DictionaryConfig, check_width, train_dictionary
from sage_fast.training.embed import embed
from sage_fast.training.encoder import EncoderConfig, train_encoder
from sage_fast.training.gan import GANConfig, train_gan
from sage_fast.training.ranks import Ranks, first_then_all, join_ranks, restarted
from sage_fast.training.reals import as_reals
from sage_fast.training.runtime import check_run_folder, holding, open_run_folder, total_steps
from sage_fast.training.watching import Measure, Watched

__all__ = [
    "BundleConfig",
    "STAGES",
    "TrainConfig",
    "adopt_generator",
    "check_bundle",
    "check_given",
    "bundle_stage",
    "dictionary_stage",
    "embed_stage",
    "encoder_stage",
    "gan_stage",
    "read_seen",
    "read_seen_of_run",
    "train_all",
]

STAGES = ("gan", "encoder", "embed", "dictionary", "bundle")
_COMMANDS = {"gan": "train-gan", "encoder": "train-encoder", "embed": "embed", "dictionary": "train-dictionary"}
#: why one category is too few for all stages but the first
_EDITS = "the dictionaries are learned from how categories differ and how images of one do, so every stage but train-gan needs two"
_STORAGE = {"float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True)
class BundleConfig:
    """What :func:`bundle_stage` writes."""

    dtype: Literal["float32", "float16"] = "float32"  # how weights and codes are stored; float16 halves the files
    discriminator: bool = False  # keep it too: a judge for quality, a start for further training
    #: keep the codes of so many first images of each seen category; None: all. Edits are drawn from how the kept ones differ:
    #: of n they have 1 - 1/n of the variance of many
    codes_per_category: int | None = None

    def __post_init__(self) -> None:
        if self.codes_per_category is not None and self.codes_per_category < 2:
            raise InputError(
                "codes_per_category must be at least 2, since edits are drawn from how the codes of a category differ, got "
                f"{self.codes_per_category}."
            )


@dataclass(frozen=True)
class TrainConfig:
    """Settings of :func:`train_all`: one part a stage."""

    resolution: int | None = None  # short for gan.resolution; give one or the other
    n_channels: int | None = None  # short for gan.n_channels; give one or the other
    gan: GANConfig = field(default_factory=GANConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    embed_batch: int = 64  # images the encoder takes at a time
    dictionary: DictionaryConfig = field(default_factory=lambda: DictionaryConfig.preset("default"))
    bundle: BundleConfig = field(default_factory=BundleConfig)

    def __post_init__(self) -> None:
        for name in ("resolution", "n_channels"):
            short, full = getattr(self, name), getattr(self.gan, name)
            if short is not None and full not in (short, getattr(GANConfig, name)):
                raise InputError(f"{name} {short} and gan.{name} {full} contradict each other; give one of them.")
        if self.embed_batch < 1:
            raise InputError(f"embed_batch must be positive, got {self.embed_batch}.")
        _check_noise(self.dictionary, self.encoder.noise)
        check_width(self.dictionary, self.gan.style_dim)
        if self.gan.conditional and self.encoder.tune_generator:
            raise InputError(
                "encoder.tune_generator samples the prior without labels, which gan.conditional needs; leave one of them out "
                "(after a preset, --encoder.no-tune-generator)."
            )
        if self.gan.conditional and self.encoder.kind == "e4e":
            raise InputError(
                "encoder.kind 'e4e' compares codes with the w of an unconditional generator, which gan.conditional leaves out; "
                "leave gan.conditional out or take encoder.kind 'psp'."
            )
        n_latent_of(self.resolved_gan.resolution)

    @property
    def resolved_gan(self) -> GANConfig:
        """``gan`` with the short names applied."""
        short = {name: getattr(self, name) for name in ("resolution", "n_channels")}
        return replace(self.gan, **{name: value for name, value in short.items() if value is not None})


class _Trained(NamedTuple):
    generator: Generator
    discriminator: Discriminator | None
    encoder: ImageEncoder | None


def train_all(
    config: TrainConfig,
    data: Source,
    out: str | Path,
    resume: bool = False,
    overwrite: bool = False,
    device: str | torch.device = "cpu",
    cache: str | Path | None = None,
    upscale: bool = False,
    watch: Callable[[ImageSet], Watched] = Watched,
) -> Path:
    """Train every network from ``data`` of seen categories; ``out`` becomes the bundle.

    Args:
        data, cache, upscale: as in :func:`read_seen`.
        resume: go on with whichever stage was interrupted; finished stages are passed over.
        overwrite: empty ``out`` first (only a folder that this package made).
        watch: what the generator is trained on and measured by, of the images; the other networks learn from all of them.
    Returns:
        ``out``, which ``load_bundle`` and the pipeline read.
    Raises:
        InputError: unusable images or settings (nothing is written then), a folder that is not empty, or a loss that
            is not finite.
    """
    gan, ranks = config.resolved_gan, join_ranks(device)
    check_run_folder(out, ranks, resume, overwrite, [config.gan.transfer_from])
    ranks.once(lambda: check_road(config, ranks, resume or restarted()))
    images = first_then_all(ranks, lambda: read_seen(data, gan.resolution, gan.n_channels, Path(out), cache, upscale))
    watched = watch(images)
    as_reals(watched.images, gan)
    with holding(out, ranks):
        folder = open_run_folder(out, ranks, resume, overwrite)
        gan_stage(gan, watched.images, folder, resume, device, watched.measure, watched.held_out)
        encoder_stage(config.encoder, images, folder, resume, device)
        embed_stage(images, folder, config.embed_batch, resume, device)
        dictionary_stage(config.dictionary, images, folder, resume, device)
        return bundle_stage(folder, config.bundle, ranks)


def read_seen(
    data: Source,
    resolution: int,
    n_channels: int = 3,
    run: Path | None = None,
    cache: str | Path | None = None,
    upscale: bool = False,
    needs_two: str | None = _EDITS,
) -> ImageSet:
    """Every image of ``data`` at ``resolution``, under a progress bar.

    Args:
        data: folder, archive, shards or a data set object: see ``data.sources``.
        run: the run folder; many images are decoded once, into its ``cache`` (see ``data.pixel_cache``).
        cache: folder of the cache in place of the run's; given, there is one however few the images are.
        upscale: allow a resolution above that of the images.
        needs_two: why one category is too few, for the message; None: it is not.
    Raises:
        InputError: unusable images, or one category (images that lie in no folder of a category are one) where two are needed,
            or no two images of one.
    """
    n_latent_of(resolution)
    listing = open_source(data, flat_ok=True)
    if needs_two is not None and len(listing.categories) < 2:
        raise InputError(
            f"Data {str(listing.root)!r} has 1 category ({listing.categories[0]}), expected at least 2, since {needs_two}; "
            "give a folder of images per category."
        )
    if needs_two == _EDITS and len(set(listing.labels)) == len(listing):
        raise InputError(
            f"Data {str(listing.root)!r} has one image in each of its {len(listing.categories)} categories, expected two in one at "
            "least, since the dictionaries are learned from how images of a category differ; put those of a category together."
        )
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("   reading", total=len(listing))

        def progress(done: int, _: int) -> None:
            bar.update(task, completed=done)

        usual = None if run is None else run / CACHE
        return read_or_map(listing, resolution, n_channels, usual, cache, progress, upscale)


def read_seen_of_run(
    data: Source, folder: Path, stage: str, cache: str | Path | None = None, upscale: bool = False
) -> ImageSet:
    """:func:`read_seen` at the resolution and with the channels of the run in ``folder``, for ``stage`` run alone."""
    config = _config(folder, "gan", stage)
    return read_seen(data, config["resolution"], config["n_channels"], folder, cache, upscale)


def gan_stage(
    config: GANConfig,
    images: Tensor | ImageSet,
    folder: Path,
    resume: bool = False,
    device: str | torch.device = "cpu",
    measure: Measure | None = None,
    held_out: ImageSet | None = None,
) -> None:
    """Train generator and discriminator on uint8 images [M, C, R, R]: ``checkpoints/gan.pt``; the rest as in ``train_gan``."""
    train_gan(config, images, folder, resume, device, measure, held_out)


def check_given(config: EncoderConfig, path: str | Path, ranks: Ranks) -> tuple[int, int]:
    """Resolution and image channels of the generator in ``path``, which an encoder of ``config`` can be trained for.

    Raises:
        InputError: no generator can be read from ``path``, or the config does not go with it.
    """
    G, D = _given_networks(path)
    check_encoder(config, G, D, ranks)
    return G.resolution, G.n_channels


def _given_networks(path: str | Path) -> tuple[Generator, Discriminator | None]:
    """The generator of a bundle or file, and its discriminator: from there, else of the run that the bundle lies in, else None."""
    G = load_generator(path)
    try:
        return G, load_discriminator(path)
    except InputError:  # many files hold none
        if (Path(path) / "bundle.json").exists() and "discriminator" in read_index(path)["networks"]:
            raise
    try:
        return G, _load_trained(Path(path), "embed").discriminator if Path(path).is_dir() else None
    except InputError:  # a bundle without its run
        return G, None


def adopt_generator(path: str | Path, folder: Path) -> None:
    """Take the generator (and its discriminator, where there is one) of a bundle or file as stage 1 of the run in ``folder``.

    Raises:
        InputError: no generator can be read from ``path``, or the run has another one.
    """
    G, D = _given_networks(path)
    sizes = {"resolution": G.resolution, "n_channels": G.n_channels, "total_steps": 0, "source": Path(path).name}
    state: dict[str, Any] = {"average": G.state_dict(), "architecture": G.architecture(), "step": 0}
    if D is not None:
        state |= {"D": D.state_dict(), "architecture_D": D.architecture()}
    target = folder / "checkpoints" / "gan.pt"
    if target.exists():
        old = _finished_state(folder, "gan", "encoder")["average"]
        if old.keys() != state["average"].keys() or any(not torch.equal(old[k], state["average"][k]) for k in old):
            raise InputError(f"{folder} has another generator than {str(path)!r}; give another folder.")
        return
    for name in ("configs", "checkpoints"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    write_json(folder / "configs" / "gan.json", sizes)  # before the checkpoint, which is not looked at without it
    with atomic_write(target) as file:
        torch.save(state, file)


def encoder_stage(
    config: EncoderConfig,
    images: Tensor | ImageSet,
    folder: Path,
    resume: bool = False,
    device: str | torch.device = "cpu",
) -> None:
    """Train the encoder (and, with ``tune_generator``, the generator further): ``checkpoints/encoder.pt``."""
    trained = _load_trained(folder, "encoder")
    ranks = join_ranks(device)
    ranks.once(lambda: check_encoder(config, trained.generator, trained.discriminator, ranks))
    ranks.once(lambda: _claim(folder, "encoder", "gan"))
    train_encoder(config, images, trained.generator, trained.discriminator, folder, resume, device)


def embed_stage(
    images: ImageSet, folder: Path, batch: int = 64, resume: bool = False, device: str | torch.device = "cpu"
) -> LatentTable:
    """W+ codes of every image: ``checkpoints/codes.safetensors``; finished codes stay with ``resume``. Rank 0 embeds."""
    path = folder / "checkpoints" / "codes.safetensors"
    if path.exists() and not resume and not restarted():
        raise InputError(f"{folder} already holds the codes of stage 'embed'; pass --resume to keep them.")
    ranks = join_ranks(device)
    ranks.once(lambda: _embed_unless_done(images, folder, path, batch, ranks.device))
    return LatentTable.load(path)


def _embed_unless_done(images: ImageSet, folder: Path, path: Path, batch: int, device: torch.device) -> None:
    trained = _load_trained(folder, "embed")
    if path.exists() and _read_lineage(folder).get("codes") == _fingerprint(folder, "encoder"):
        _check_embedded(LatentTable.load(path), images, folder)
        return
    assert trained.encoder is not None
    noise = _config(folder, "encoder")["noise"]
    table = embed(images, trained.encoder.to(device), trained.generator.to(device), batch, noise)
    path.unlink(missing_ok=True)
    _claim(folder, "codes", "encoder")
    table.save(path)


def _check_embedded(table: LatentTable, images: ImageSet, folder: Path) -> None:
    """Raise InputError where the codes in ``folder`` are not those of ``images``."""
    if table.files != images.files or table.categories != images.categories:
        raise InputError(
            f"the codes in {folder} are of other images than those of {images.root or 'the data'}; give the data that "
            f"was embedded, or delete {folder / 'checkpoints' / 'codes.safetensors'} and run the embed stage again."
        )


def dictionary_stage(
    config: DictionaryConfig,
    images: ImageSet,
    folder: Path,
    resume: bool = False,
    device: str | torch.device = "cpu",
) -> CategoryIrrelevantDictionary:
    """Learn the category-irrelevant directions from the cached codes: ``checkpoints/dictionary.pt``."""
    trained, table = _load_trained(folder, "dictionary"), _load_codes(folder)
    _check_noise(config, _config(folder, "encoder")["noise"])
    _check_embedded(table, images, folder)
    network, perceptual = _config(folder, "encoder")["perceptual"], None
    config.check_network(network)
    if config.rec_weight and config.perceptual_weight:
        perceptual = load_perceptual(network, trained.discriminator)
    join_ranks(device).once(lambda: _claim(folder, "dictionary", "codes"))
    return train_dictionary(
        config, table.w_plus, table.labels, images, trained.generator, perceptual, folder, resume, device
    )


def check_bundle(folder: Path, config: BundleConfig) -> None:
    """Raise InputError for a discriminator to be kept that the run in ``folder`` has not."""
    if config.discriminator and "D" not in _finished_state(folder, "gan", "dictionary"):
        raise InputError(
            f"{folder} has no discriminator to keep, since its generator came without one; leave bundle.discriminator out."
        )


def bundle_stage(folder: Path, config: BundleConfig = BundleConfig(), ranks: Ranks | None = None) -> Path:
    """Write the bundle (``bundle.json`` and its safetensors files) of a finished run into its own folder."""
    (ranks or join_ranks()).once(lambda: _write_bundle(folder, config))
    return folder


def _write_bundle(folder: Path, config: BundleConfig) -> None:
    trained, table = _load_trained(folder, "bundle"), _load_codes(folder)
    _check_source(folder, "dictionary", "codes")
    assert trained.encoder is not None
    settings = _config(folder, "dictionary")
    state = _finished_state(folder, "dictionary", "bundle")
    groups = [list(group) for group in layer_groups(trained.generator.n_latent, settings["reading"])]
    save_bundle(
        folder,
        generator=trained.generator,
        encoder=trained.encoder,
        directions=state["directions"].float().cpu(),
        groups=groups,
        codes=_first_of_each(table, config.codes_per_category),
        discriminator=trained.discriminator if config.discriminator else None,
        noise=_config(folder, "encoder")["noise"],
        about=_about(folder, table),
        dtype=_STORAGE[config.dtype],
    )
    _warn_of_mapping(table)


def _warn_of_mapping(codes: LatentTable) -> None:
    """Warn where the seen categories are too few for class embedding mapping."""
    relevant = CategoryRelevantDictionary(1).fit(codes.w_plus, codes.labels)
    n_components = usual_components(relevant, codes.w_plus, codes.labels)
    sentence = mapping_warning(relevant, codes.w_plus, codes.labels, n_components)
    if sentence is not None:
        warnings.warn(sentence, SageFastWarning, stacklevel=4)


def _first_of_each(table: LatentTable, n: int | None) -> LatentTable:
    """The first ``n`` codes of each category, or the table itself."""
    if n is None:
        return table
    one_hot = torch.nn.functional.one_hot(table.labels, len(table.categories))
    number = one_hot.cumsum(0).gather(1, table.labels.unsqueeze(1)).squeeze(1)  # 1, 2, ... within the category
    return table.subset((number <= n).nonzero().flatten())


def _check_noise(config: DictionaryConfig, noise: str) -> None:
    if config.noise != noise:
        raise InputError(
            f"the encoder's noise is {noise!r}, the dictionary's {config.noise!r}; give both the same, since a code "
            "stands for one image."
        )


def _load_trained(folder: Path, stage: str) -> _Trained:
    """The finished networks that ``stage`` builds on, rebuilt from their checkpoints on the CPU, in eval mode."""
    c, state = _config(folder, "gan", stage), _finished_state(folder, "gan", stage)
    G, D = _trained_gan(c, state)
    E = None
    if stage != "encoder":
        _check_source(folder, "encoder", "gan")
        c, state = _config(folder, "encoder", stage), _finished_state(folder, "encoder", stage)
        E = build_encoder(state.get("architecture") or _sizes_of_old_runs(c, G))
        E.load_state_dict(state["average"])
        E.eval().requires_grad_(False)
        if c["tune_generator"]:
            assert D is not None
            G.load_state_dict(state["average_G"])
            D.load_state_dict(state["D"])
    return _Trained(G.eval().requires_grad_(False), None if D is None else D.eval().requires_grad_(False), E)


def _trained_gan(c: dict[str, Any], state: dict[str, Any]) -> tuple[Generator, Discriminator | None]:
    """Generator and discriminator of stage 1, trained or adopted; an adopted generator may come alone."""
    if "architecture" in state:
        G = Generator(**state["architecture"])
        D = Discriminator(**state["architecture_D"]) if "D" in state else None
    else:
        size = {"channel_base": c["channel_base"], "channel_max": c["channel_max"]}
        G = Generator(c["resolution"], c["style_dim"], c["n_mapping"], c["n_channels"], **size)
        D = Discriminator(c["resolution"], c["n_channels"], **size)
    G.load_state_dict(state["average"])
    if D is not None:
        D.load_state_dict(state["D"])
    return G, D


def _sizes_of_old_runs(c: dict[str, Any], G: Generator) -> dict[str, Any]:
    """The encoder of a checkpoint from before there were kinds."""
    shape = {name: getattr(G, name) for name in ("resolution", "n_latent", "style_dim", "n_channels")}
    return shape | {name: c[name] for name in ("channel_base", "channel_max", "head_width")}


def _load_codes(folder: Path) -> LatentTable:
    path = folder / "checkpoints" / "codes.safetensors"
    if not path.exists():
        raise InputError(f"{folder} holds no codes; run 'sage-fast embed' in it first.")
    if _read_lineage(folder).get("codes") != _fingerprint(folder, "encoder"):
        raise InputError(f"the codes in {folder} are of another encoder; run 'sage-fast embed --resume' in it again.")
    return LatentTable.load(path)


def _config(folder: Path, stage: str, wanted_by: str = "") -> dict[str, Any]:
    """The resolved settings a stage was run with."""
    path = folder / "configs" / f"{stage}.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise _missing(folder, stage, wanted_by) from error
    except ValueError as error:
        raise InputError(f"{path} is not the JSON of a finished stage; train it again in another folder.") from error


def _finished_state(folder: Path, stage: str, wanted_by: str) -> dict[str, Any]:
    """The checkpoint of a stage that has taken all its steps."""
    path = folder / "checkpoints" / f"{stage}.pt"
    if not path.exists():
        raise _missing(folder, stage, wanted_by)
    state = read_state(path)
    total = total_steps(_config(folder, stage, wanted_by))
    if total is not None and state["step"] < total and not state.get("stopped_early"):
        raise InputError(
            f"stage '{stage}' in {folder} is at step {state['step']} of {total}; "
            f"finish it with 'sage-fast {_COMMANDS[stage]} --resume'."
        )
    return state


def _missing(folder: Path, stage: str, wanted_by: str) -> InputError:
    return InputError(
        f"{folder} holds no trained stage '{stage}', which stage '{wanted_by}' builds on; "
        f"run 'sage-fast {_COMMANDS[stage]}' in it first."
    )


def _fingerprint(folder: Path, stage: str) -> str:
    """First 16 hex digits of the SHA-256 of a stage's file."""
    name = "codes.safetensors" if stage == "codes" else f"{stage}.pt"
    return hashlib.sha256((folder / "checkpoints" / name).read_bytes()).hexdigest()[:16]


def _read_lineage(folder: Path) -> dict[str, str]:
    path = folder / "configs" / "lineage.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _claim(folder: Path, stage: str, source: str) -> None:
    """Note which file of ``source`` the stage works from; refuse to continue a stage begun from another one."""
    found = _check_source(folder, stage, source)
    write_json(folder / "configs" / "lineage.json", {**_read_lineage(folder), stage: found})


def _check_source(folder: Path, stage: str, source: str) -> str:
    """The fingerprint of ``source``; raise InputError where the stage was begun from another file of it."""
    found = _fingerprint(folder, source)
    name = "codes.safetensors" if stage == "codes" else f"{stage}.pt"
    begun = (folder / "checkpoints" / name).exists()
    if begun and _read_lineage(folder).get(stage, found) != found:
        raise InputError(
            f"stage '{stage}' in {folder} was begun from an earlier '{source}', which has changed since; delete "
            f"{folder / 'checkpoints' / name} to start the stage anew."
        )
    return found


def _about(folder: Path, table: LatentTable) -> dict[str, Any]:
    """What ``bundle.json`` says of the training: settings, data in numbers, the last logged line of each stage."""
    names = ("gan", "encoder", "dictionary")
    return {
        "settings": {name: _without_folders(_config(folder, name)) for name in names},
        "data": {"n_images": len(table), "n_categories": len(table.categories)},
        "last_logged": {name: _last_logged(folder, name) for name in names},
    }


def _without_folders(value: Any) -> Any:
    """Settings with names in place of absolute paths: a bundle is for others, whom its maker's folders tell nothing."""
    if isinstance(value, dict):
        return {key: _without_folders(part) for key, part in value.items()}
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _last_logged(folder: Path, stage: str) -> dict[str, Any]:
    """The last value of everything a stage logged, without clock times."""
    values: dict[str, Any] = {}
    path = folder / "logs" / f"{stage}.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        values |= json.loads(line)
    return {key: value for key, value in values.items() if key not in ("seconds", "time")}
