"""The pipeline at scale: a plan in, images out, exactly once whatever interrupts it.

OUT/<category>/<category>_00000.png   the images (or OUT/shard-000000.tar, or OUT/images.safetensors)
OUT/contact_sheet.png                 the shots of each category, then generated images
OUT/config.json                       the resolved settings and the plan
OUT/README.md                         what the images are
OUT/SHA256SUMS                        digests of these and of the manifest
OUT/manifest.jsonl                    a line an image: how it came to be; written last
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import torch

from sage_fast.arithmetic import computed, float32_products, one_thread
from sage_fast.data.writers import TEMPORARY, check_apart, check_file
from sage_fast.errors import InputError, counted
from sage_fast.generation.agreeing import (
    agree,
    choose_config_encoder,
    prepare_output_of,
    read_settings,
    shape_of,
    take_back_missing,
    with_settings,
)
from sage_fast.generation.card import data_card, draw_sheet
from sage_fast.generation.checksums import CARD, CONFIG, MANIFEST, PARQUET, SHEET, digest_of, read_sums, write_sums
from sage_fast.generation.committing import (
    committed,
    is_complete,
    keep_parquet,
    keeps_parquet,
    write_manifest,
    write_parquet,
)
from sage_fast.generation.config import GenerateConfig
from sage_fast.generation.drawing import Prepared
from sage_fast.generation.formats import Format
from sage_fast.generation.locks import alone, joined
from sage_fast.generation.plan import Plan
from sage_fast.generation.plan_files import read_plan
from sage_fast.generation.stores import STATE, Store, open_store
from sage_fast.generation.watching import Meter
from sage_fast.generation.writing import write_shards
from sage_fast.pipeline import FewShotPipeline

__all__ = ["Summary", "Writer", "generate", "load_pipeline", "open_output", "plan_of", "ranks", "write_here"]

_BATCH_PIXELS = {
    "cpu": 1 << 18,
    "cuda": 1 << 22,
}  # of a micro-batch; a CPU gains nothing from more, but needs the memory

Writer = Callable[[Format, list[int], Prepared, GenerateConfig, Meter, Callable[[int], None], Callable[[], None]], None]
"""Draws, stores and commits shards; says how many images are written, and when a shard is committed."""


@dataclass(frozen=True)
class Summary:
    """What :func:`generate` did: ``n_new`` images drawn, ``n_kept`` found finished, of ``categories``.

    ``missing``: shards of other ranks that are not written yet; the output is complete when there are none.
    """

    out: str
    categories: list[str]
    n_new: int
    n_kept: int
    missing: int = 0

    def __str__(self) -> str:
        kept = f", {self.n_kept} {'was' if self.n_kept == 1 else 'were'} there already" if self.n_kept else ""
        drawn = f"{counted(self.n_new, 'image')} of {counted(len(self.categories), 'category')}"
        drawn += f" {'was' if self.n_new == 1 else 'were'} drawn{kept}"
        if self.missing:
            shards = "1 shard of another rank is" if self.missing == 1 else f"{self.missing} shards of other ranks are"
            return f"{drawn}; {shards} not there yet."
        return f"{drawn}; see {self.out.rstrip('/')}/contact_sheet.png."


def generate(
    model: FewShotPipeline | str | os.PathLike[str] | None,
    shots_dir: str | os.PathLike[str] | None,
    out: str | os.PathLike[str],
    config: GenerateConfig = GenerateConfig(),
    progress: Callable[[int, int], None] | None = None,
    meter: Meter | None = None,
    plan: str | os.PathLike[str] | None = None,
    write: Writer | None = None,
) -> Summary:
    """Generate the images of a plan, or those of this rank where the environment names ``RANK`` and ``WORLD_SIZE``.

    The same plan gives the same latents to the last bit, and the same bytes on one kind of device, whatever the number of
    ranks and whatever interrupted them. Everything is checked before the first file is written.

    Args:
        model: a pipeline, a bundle folder, or None for the model shipped with the package.
        shots_dir: ``<category>/<image>`` with one to a few images each, or one flat folder for one category. With
            ``plan``: where the categories' folders are; None: where the plan says.
        out: the output folder or any fsspec URL; new or empty, unless ``config.resume`` or ``config.overwrite``.
        progress: called with (images done, images in all) of this rank.
        meter: is kept up to date while the run goes on.
        plan: a .yaml, .json or .csv file, see :mod:`sage_fast.generation.plan_files`.
        write: draws, stores and commits the shards that are not there yet; None: this process.
    Raises:
        InputError: a model, plan, settings or an output that cannot be used, or a full disk; a resumed run goes on.
    """
    rank, world_size = ranks()
    pipeline = load_pipeline(model, config)
    made = plan_of(pipeline, shots_dir, config, plan)
    check(out, None if plan else shots_dir, made, model, config, world_size)
    prepared = Prepared(pipeline, made)
    meter = Meter() if meter is None else meter
    with float32_products(pipeline.precision):
        _check_settings(prepared)
        with open_output(pipeline, made, out, config) as format:
            _write(format, prepared, config, meter, progress, rank, world_size, write or write_here)
    missing = format.plan.n_shards - len(committed(format.target, format.plan))
    return Summary(str(format.target), format.plan.categories, meter.done - meter.kept, meter.kept, missing)


@contextmanager
def open_output(
    pipeline: FewShotPipeline, plan: Plan, out: str | os.PathLike[str], config: GenerateConfig
) -> Iterator[Format]:
    """Begin or take up an output: while the block runs, shards of the yielded format's plan may be written to it.

    Other processes get at it with :func:`~sage_fast.generation.agreeing.format_of`. When the block ends well and every shard is
    committed, the output is completed.

    Raises:
        InputError: the output is not to be written into, has another plan, or another run is at work on it.
    """
    rank, world_size = ranks()
    store, encoder = open_store(out), choose_config_encoder(config, pipeline)
    prepare_output_of(store, config, rank, world_size)
    file, folder, setup = store.locks
    with joined(str(store), file, folder, rank, world_size, store.empty if config.overwrite else None):
        try:
            with alone(setup):
                if keeps_parquet(store):
                    _check_parquet(
                        plan, f"Output {str(store)!r} has a manifest.parquet, and that", "take another output"
                    )
                format = agree(store, pipeline, plan, encoder, config)
                if config.parquet:
                    keep_parquet(store)
                take_back_missing(format, rank, world_size)
            yield format
            with alone(setup):
                _finish(format)
        finally:
            _clear(store, setup)


def _clear(store: Store, setup: Path) -> None:
    """Delete what a complete output does not need."""
    if is_complete(store):
        with alone(setup):
            if is_complete(store):  # unless another rank has just found an image gone
                store.remove(STATE)


def ranks() -> tuple[int, int]:
    """This process's number and how many there are, as torchrun puts them into the environment; (0, 1) without.

    Lightning's own launcher names no ``RANK``; on its first node that is ``LOCAL_RANK``.

    Raises:
        InputError: one of the two without the other, or numbers that cannot be.
    """
    words = [os.environ.get(name) for name in ("RANK", "WORLD_SIZE")]
    if words[0] is None and words[1] is not None and os.environ.get("NODE_RANK") == "0":
        words[0] = os.environ.get("LOCAL_RANK")
    if words == [None, None]:
        return 0, 1
    try:
        rank, world_size = (int(word or "") for word in words)
    except ValueError:
        rank = world_size = -1
    if not 0 <= rank < world_size:
        raise InputError(
            f"RANK and WORLD_SIZE must be 0 <= RANK < WORLD_SIZE, got {words[0]} and {words[1]}; unset both."
        )
    return rank, world_size


def load_pipeline(model: FewShotPipeline | str | os.PathLike[str] | None, config: GenerateConfig) -> FewShotPipeline:
    """The pipeline itself, or that of a bundle, on the device of the settings (of a rank: its own GPU)."""
    if isinstance(model, FewShotPipeline):
        wanted = {"preset": config.preset, "precision": computed(config.precision, model.device)}
        if model.device.type != "cpu":
            wanted["inversion_device"] = config.inversion_device
        for name, value in wanted.items():
            if getattr(model, name) != value:
                raise InputError(
                    f"the pipeline has {name} '{getattr(model, name)}' and the config '{value}'; give both the same."
                )
        return model
    device = config.device
    if device == "auto" and torch.cuda.is_available():
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"
    return FewShotPipeline.from_bundle(
        model, "cpu" if device == "auto" else device, config.preset, config.precision, config.inversion_device
    )


def plan_of(
    pipeline: FewShotPipeline,
    shots_dir: str | os.PathLike[str] | None,
    config: GenerateConfig,
    file: str | os.PathLike[str] | None = None,
) -> Plan:
    """:func:`read_plan` for a pipeline, with its preset's settings and micro-batches that suit its device unless others are given."""
    plan = with_settings(pipeline, read_plan(file, shots_dir, config, *shape_of(pipeline)[:2]))
    mapped = [part.n_components for part in plan.parts if part.n_components is not None]
    if mapped and ranks()[0] == 0:
        pipeline.warn_of_mapping(min(mapped))
    pixels = _BATCH_PIXELS["cpu" if pipeline.device.type == "cpu" else "cuda"]
    batch = min(64, max(1, pixels // pipeline.generator.resolution**2))
    return plan if config.batch is not None else replace(plan, batch=batch)


def check(
    out: str | os.PathLike[str],
    shots_dir: str | os.PathLike[str] | None,
    plan: Plan,
    model: FewShotPipeline | str | os.PathLike[str] | None,
    config: GenerateConfig,
    world_size: int,
) -> None:
    """Raise InputError for what can be told without looking at the output."""
    if config.overwrite and world_size > 1:
        raise InputError("--overwrite does not go with several ranks, of which one would delete another's images.")
    if config.parquet:
        _check_parquet(plan, "parquet", "leave parquet out")
    if config.metrics is not None:
        check_file(config.metrics, "metrics")
    store = open_store(out)
    if not store.local:
        return
    out = str(store)  # of a URL like file:///folder the folder
    models = [None if isinstance(model, FewShotPipeline) else model]
    if shots_dir is not None:
        check_apart(out, {"the shots": shots_dir}, models)
    else:  # the folder of a plan may hold the output, but the output no shot
        for file in {str((plan.root / file).parent) for part in plan.parts for file in part.shots}:
            if Path(out).resolve() in (Path(file).resolve(), *Path(file).resolve().parents):
                raise InputError(
                    f"Output folder {str(out)!r} holds shots of the plan, in {file!r}; give another folder."
                )
        check_apart(out, {}, models)


def _check_parquet(plan: Plan, what: str, remedy: str) -> None:
    """Raise InputError where the plan's manifest cannot be a Parquet file; ``what`` asks for one, ``remedy`` does without."""
    if find_spec("pyarrow") is None:
        raise InputError(f"{what} needs pyarrow; pip install 'sage_fast[parquet]', or {remedy}.")
    words = (word for part in plan.parts for word in (part.category, *part.shots))
    if (foreign := next((word for word in words if not _is_unicode(word)), None)) is not None:
        raise InputError(f"{what} holds text alone, and the name {foreign!r:.60} is none; rename it, or {remedy}.")


def _is_unicode(name: str) -> bool:
    """Whether a file's name is text, not bytes that stand for themselves."""
    return not any("\ud800" <= sign <= "\udfff" for sign in name)


def _check_settings(prepared: Prepared) -> None:
    """Raise what any setting of the plan can raise: prepares one part of each kind."""
    kinds: dict[tuple[object, ...], int] = {}
    for number, part in enumerate(prepared.plan.parts):
        kinds.setdefault((part.method, len(part.shots) == 1, *part.editor_options().items()), number)
    with one_thread():  # a few small images: on a busy machine threads would wait longer than they work
        for number in kinds.values():
            prepared[number]


def _write(
    format: Format,
    prepared: Prepared,
    config: GenerateConfig,
    meter: Meter,
    progress: Callable[[int, int], None] | None,
    rank: int,
    world_size: int,
    write: Writer,
) -> None:
    """Draw the shards of this rank that are not there yet."""
    plan, done = format.plan, committed(format.target, format.plan)
    mine = range(rank, plan.n_shards, world_size)
    todo = [shard for shard in mine if shard not in done]
    total, left = (sum(len(plan.positions(shard)) for shard in shards) for shards in (mine, todo))
    meter.start(total, total - left)

    def written(n: int) -> None:
        if progress is not None:
            progress(meter.done, total)

    def note() -> None:
        if config.metrics is not None:
            meter.append_to(Path(config.metrics if world_size == 1 else f"{config.metrics}.{rank}"))

    write(format, todo, prepared, config, meter, written, note)


def write_here(
    format: Format,
    shards: list[int],
    prepared: Prepared,
    config: GenerateConfig,
    meter: Meter,
    written: Callable[[int], None] | None = None,
    note: Callable[[], None] | None = None,
) -> None:
    """The shards by this process alone."""
    workers = config.workers or max(2, torch.get_num_threads())  # they wait for the disk too
    write_shards(format, shards, prepared, workers, meter, written, note)


def _finish(format: Format) -> None:
    """Complete the output if every shard of it is written; what a complete one lacks is put back."""
    store, plan = format.target, format.plan
    if len(committed(store, plan)) < plan.n_shards:
        return
    complete = is_complete(store)
    if not complete:
        format.finish()
    recorded = read_sums(store) if complete else None
    sums = dict(recorded or {})
    for name, make in ((CARD, _card), (SHEET, _sheet)):
        if name not in sums or store.size(name) is None:
            content = make(format)
            store.write(name, content)
            sums[name] = hashlib.sha256(content).hexdigest()
    if CONFIG not in sums:
        sums[CONFIG] = digest_of(store, CONFIG)
    if not complete:
        recorded = write_manifest(store, plan, sums)
        sums = dict(recorded)
    elif MANIFEST not in sums:
        sums[MANIFEST] = digest_of(store, MANIFEST)
    if keeps_parquet(store) and (PARQUET not in sums or store.size(PARQUET) is None):
        write_parquet(store)
        sums[PARQUET] = digest_of(store, PARQUET)
    if sums != recorded:
        write_sums(store, sums)
    for name in store.names(""):
        if name.endswith(TEMPORARY):
            store.remove(name)


def _card(format: Format) -> bytes:
    settings = read_settings(format.target)
    assert settings is not None
    return data_card(settings, format.plan).encode("utf-8", "surrogateescape")


def _sheet(format: Format) -> bytes:
    sheet = io.BytesIO()
    draw_sheet(format).save(sheet, format="PNG")
    return sheet.getvalue()
