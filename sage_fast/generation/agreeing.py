"""Whose plan an output has: what is written down in its config.json, and what a new run finds there."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace
from functools import cache
from typing import Any

import torch

from sage_fast import __version__
from sage_fast.errors import InputError
from sage_fast.generation.checksums import CONFIG, SUMS, digest_of, read_sums
from sage_fast.generation.committing import committed, count_lines, is_complete, reopen
from sage_fast.generation.config import GenerateConfig
from sage_fast.generation.drawing import Prepared, draw_images, draw_latents
from sage_fast.generation.encoding import Encoder, choose_encoder
from sage_fast.generation.formats import Format, Stored, choose_format, read_only
from sage_fast.generation.memory import room_for
from sage_fast.generation.plan import Plan, check_grown
from sage_fast.generation.stores import Store, make_state, open_store
from sage_fast.pipeline import FewShotPipeline

__all__ = [
    "agree", "choose_config_encoder", "digest_of_lost_config", "first_images", "format_of", "prepare_output_of",
    "read_settings", "shape_of", "shard_of", "take_back_missing", "with_settings",
]  # fmt: skip

_FREE = ("version", "device", "shots_dir", "n_images", "plan", "checksums")  # may differ in a run's continuation
_MB = 1_000_000


def choose_config_encoder(config: GenerateConfig, pipeline: FewShotPipeline) -> Encoder | None:
    """The encoder of the settings for a pipeline's images; None: they are stored as plain arrays."""
    if config.format == "safetensors":
        return None
    return choose_encoder(config.encoder, config.image, config.quality, pipeline.generator.n_channels, pipeline.device)


def prepare_output_of(store: Store, config: GenerateConfig, rank: int, world_size: int) -> None:
    """Refuse an output that is not to be written into; ranks that come later find the files of those before them."""

    def is_ours() -> bool:
        return world_size > 1 and store.size(CONFIG) is not None and (rank > 0 or not is_complete(store))

    if config.overwrite:
        store.prepare_emptying()
        return
    try:
        store.prepare(config.resume or is_ours())
        if digest_of_lost_config(store) is None:
            read_settings(store)
    except InputError:  # or they came in between
        if not is_ours():
            raise


def agree(
    store: Store, pipeline: FewShotPipeline, plan: Plan, encoder: Encoder | None, config: GenerateConfig
) -> Format:
    """Write down the plan of a new output; or raise InputError unless the plan is that of the output, or more of it."""
    plan, lost = with_settings(pipeline, plan), digest_of_lost_config(store)
    old = read_settings(store) if lost is None else None
    if config.batch is None and old is not None:
        plan = replace(plan, batch=int(old["batch"]))
    if config.shard_mb is not None:
        same = old is not None and old.get("shard_mb") == config.shard_mb
        plan = replace(plan, shard=int(old["shard"]) if old and same else shard_of(pipeline, plan, encoder, config))
    room_for(pipeline, plan, torch.get_num_threads())
    settings = _resolve(pipeline, plan, encoder, config)
    format = choose_format(config.format, store, plan, encoder, shape_of(pipeline))
    make_state(store)
    if lost is not None and hashlib.sha256(_json(settings)).hexdigest() != lost:
        raise InputError(
            f"config.json in {str(store)!r} is not the file that was recorded, and this command would write another; repeat "
            "the command, model and version of the first run, or give another folder."
        )
    if old is None:
        store.write(CONFIG, _json(settings))
        return format
    changed = [key for key in settings if key not in _FREE and old.get(key) != settings[key]]
    if changed:
        was = ", ".join(f"{key} was {old.get(key)!r:.90}, is {settings[key]!r:.90}" for key in changed)
        raise InputError(f"Output {str(store)!r} was made with other settings ({was}); give another folder.")
    check_grown(Plan.read(old), plan)
    if old["plan"] != settings["plan"]:
        reopen(choose_format(config.format, store, Plan.read(old), encoder, shape_of(pipeline)), plan=plan)
        store.write(CONFIG, _json(settings))
    return format


def with_settings(pipeline: FewShotPipeline, plan: Plan) -> Plan:
    """The plan with the editor's settings that its parts leave to the preset.

    Raises:
        InputError: settings that the model does not allow.
    """
    settings = cache(pipeline.editor_settings)  # of as many kinds as the plan has, not of every part
    parts = [
        replace(part, **settings(part.method, min(2, len(part.shots)), **part.editor_options())) for part in plan.parts
    ]
    return replace(plan, parts=tuple(parts))


def read_settings(store: Store) -> dict[str, Any] | None:
    """The content of an output's config.json; None: no run has begun.

    Raises:
        InputError: it is damaged, or not that of generate.
    """
    if store.size(CONFIG) is None:
        if is_complete(store):
            raise InputError(f"Output {str(store)!r} holds no run of generate to resume; give another folder.")
        return None
    try:
        settings = json.loads(store.read(CONFIG))
    except (ValueError, RecursionError) as error:
        raise InputError(f"config.json in {str(store)!r} is damaged; use --overwrite or another output.") from error
    if not isinstance(settings, dict) or not isinstance(settings.get("plan"), list):
        raise InputError(f"Output {str(store)!r} holds no run of generate to resume; give another folder.")
    older = {"precision": "float32", "inversion_device": "cpu" if settings.get("device") == "cpu" else "model"}
    return older | settings


def digest_of_lost_config(store: Store) -> str | None:
    """The recorded digest of a config.json that is gone or altered; None: it is as recorded, or none was."""
    recorded = (read_sums(store) or {}).get(CONFIG)
    if recorded is None or (store.size(CONFIG) is not None and digest_of(store, CONFIG) == recorded):
        return None
    return recorded


def _resolve(pipeline: FewShotPipeline, plan: Plan, encoder: Encoder | None, config: GenerateConfig) -> dict[str, Any]:
    """Every setting with its value, the model and the plan: the content of config.json."""
    return {
        "batch": plan.batch,
        "checksums": SUMS,
        "device": pipeline.device.type,
        "encoder": encoder.name if encoder else None,
        "format": config.format,
        "image": config.image if encoder else None,
        "inversion_device": "cpu" if pipeline.device.type == "cpu" else pipeline.inversion_device,
        "model": pipeline.hash,
        "n_channels": pipeline.generator.n_channels,
        "n_images": len(plan),
        "plan": plan.describe(),
        "precision": pipeline.precision,
        "preset": pipeline.preset,
        "quality": config.quality,
        "resolution": pipeline.generator.resolution,
        "shard": plan.shard,
        "shard_mb": config.shard_mb,
        "shots_dir": os.path.abspath(plan.root),
        "version": __version__,
    }


def shard_of(pipeline: FewShotPipeline, plan: Plan, encoder: Encoder | None, config: GenerateConfig) -> int:
    """How many images make a tar file of ``config.shard_mb``, by the size of the first ones: a function of the plan."""
    format = choose_format("webdataset", open_store("."), plan, encoder, shape_of(pipeline))
    sizes = [format.taken(image) for image in first_images(pipeline, format)]
    return max(1, int(float(config.shard_mb or 0) * _MB * len(sizes) / sum(sizes)))


def first_images(pipeline: FewShotPipeline, format: Format) -> list[Stored]:
    """The first micro-batch of a plan, encoded; nothing is written."""
    latents = draw_latents(Prepared(pipeline, format.plan), format.plan.batches(0)[0])
    contents = format.contents(draw_images(pipeline, latents))
    return [format.store(*one) for one in zip(latents.positions, contents, latents.about())]


def shape_of(pipeline: FewShotPipeline) -> tuple[int, int, int]:
    return pipeline.generator.n_channels, pipeline.generator.resolution, pipeline.generator.resolution


def take_back_missing(format: Format, rank: int, world_size: int) -> None:
    """Shards whose files are gone are drawn again."""
    whole = is_complete(format.target)
    if whole and count_lines(format.target) != len(format.plan):
        reopen(format)
        whole = False
    mine = {k for k in committed(format.target, format.plan) if whole or k % world_size == rank}
    missing = {shard for shard in mine if format.is_missing(shard)}
    if missing:
        reopen(format, missing)


def _json(settings: dict[str, Any]) -> bytes:
    return (json.dumps(settings, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def format_of(out: str | os.PathLike[str], writing: bool = True, device: torch.device | None = None) -> Format:
    """The format of an output that a run has begun, with its plan: for another process that writes shards of it.

    Args:
        writing: False leaves the encoder out, which then need not be installed.
        device: where the images are drawn, for an encoder that works there; None: a GPU when there is one.
    Raises:
        InputError: no run has begun there, or its encoder is here another.
    """
    store = open_store(out)
    settings = read_settings(store)
    if settings is None:
        raise InputError(f"Output {str(store)!r} holds no run of generate; give the folder that generate wrote into.")
    name, image, n_channels = settings["encoder"], settings["image"], settings["n_channels"]
    encoder = None
    if name is not None:
        encoder = read_only(name, image)
        if writing:
            device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
            encoder = choose_encoder(name.split()[0], image, settings["quality"], n_channels, device)
            if encoder.name != name:
                raise InputError(
                    f"Output {str(store)!r} is written with {name}, and here is {encoder.name}; install that."
                )
    shape = (n_channels, settings["resolution"], settings["resolution"])
    return choose_format(settings["format"], store, Plan.read(settings), encoder, shape)
