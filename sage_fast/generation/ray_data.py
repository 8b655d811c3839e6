"""Shards on the workers of a Ray cluster: the plan's shards are the dataset, drawing and writing them is its stage.

The writers are those of every other run, so a shard that is drawn twice, because a worker died, has the same bytes.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np

from sage_fast.arithmetic import float32_products
from sage_fast.errors import InputError
from sage_fast.generation.agreeing import format_of, read_settings
from sage_fast.generation.config import GenerateConfig
from sage_fast.generation.drawing import Prepared
from sage_fast.generation.formats import Format
from sage_fast.generation.run import Summary, generate, load_pipeline, ranks, write_here
from sage_fast.generation.watching import Meter
from sage_fast.pipeline import FewShotPipeline

__all__ = ["ShardWriter", "generate_on_ray"]

_BLOCKS = 10_000  # most tasks that Ray is given; of a larger plan several shards make one


def generate_on_ray(
    model: FewShotPipeline | str | os.PathLike[str] | None,
    shots_dir: str | os.PathLike[str] | None,
    out: str | os.PathLike[str],
    config: GenerateConfig = GenerateConfig(),
    progress: Callable[[int, int], None] | None = None,
    meter: Meter | None = None,
    plan: str | os.PathLike[str] | None = None,
    n_workers: int = 2,
    num_gpus: float | None = None,
) -> Summary:
    """:func:`generate`, with the same files to the byte, by ``n_workers`` actors of Ray instead of this process.

    This process checks, plans, locks and completes the output; actors draw shards. One that dies is started anew and its
    shard drawn again. Model, shots and output must have the same names on all nodes. Ray is started on this machine unless
    it runs already or the environment names ``RAY_ADDRESS``.

    Args:
        n_workers: actors, each with a copy of the model.
        num_gpus: GPUs of each; None: 1 if the cluster has any and ``config.device`` is not ``"cpu"``, else 0. With GPUs and a
            driver that has none, give ``config.batch``, which is else made for a CPU.
    Raises:
        InputError: as :func:`generate`; Ray is not installed; fewer than one worker; or several ranks.
    """
    if n_workers < 1:
        raise InputError(f"n_workers must be at least 1, got {n_workers}.")
    if ranks()[1] > 1:
        raise InputError("Ray spreads the shards itself; unset RANK and WORLD_SIZE, or leave Ray out.")
    try:
        import ray.data  # noqa: F401
    except ImportError as error:  # a folder named ray can be imported too
        raise InputError("generate_on_ray needs Ray; pip install 'sage_fast[ray]', or use torchrun.") from error
    where = model if model is None or isinstance(model, FewShotPipeline) else os.path.abspath(model)
    write = partial(_write, where, n_workers, num_gpus)
    return generate(where, shots_dir, out, config, progress, meter, plan, write)


@dataclass(frozen=True)
class _Job:
    """All that an actor needs to know; ``hash`` is of the model of the process that made the plan."""

    model: FewShotPipeline | str | None
    out: str
    config: GenerateConfig
    hash: str

    def open(self) -> tuple[Format, Prepared]:
        """The output and the model on this node.

        Raises:
            InputError: the node has another model or encoder than the output is made with.
        """
        pipeline = load_pipeline(self.model, self.config)
        if pipeline.hash != self.hash:
            raise InputError(
                f"Node {platform.node()!r} has model {pipeline.hash}, the plan was made with {self.hash}; use one model."
            )
        format = format_of(self.out, device=pipeline.device)
        settings = read_settings(format.target)
        if settings is None or pipeline.precision != settings["precision"]:
            raise InputError(
                f"Node {platform.node()!r} draws in {pipeline.precision}, and the output is drawn in "
                f"{(settings or {}).get('precision')}; use nodes of one kind, or precision 'float32'."
            )
        return format, Prepared(pipeline, format.plan)


class ShardWriter:
    """The stage: numbers of shards in a column ``shard`` to how many images each has, once they are committed."""

    def __init__(self, job: _Job) -> None:
        self.job = job

    @cached_property
    def opened(self) -> tuple[Format, Prepared]:
        """Opened with the first batch, so that what fails there is told as what fails later."""
        return self.job.open()

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """An InputError is a row too: of exceptions that cross the cluster not all arrive as they were."""
        shards = [int(shard) for shard in batch["shard"]]
        images, error = [0] * len(shards), ""
        try:
            format, prepared = self.opened
            with float32_products(prepared.pipeline.precision):
                write_here(format, shards, prepared, self.job.config, Meter())
            images = [len(format.plan.positions(shard)) for shard in shards]
        except InputError as found:
            error = str(found)
        return {"shard": batch["shard"], "images": np.array(images), "error": np.array([error] * len(shards))}


def _write(
    model: FewShotPipeline | str | None,
    n_workers: int,
    num_gpus: float | None,
    format: Format,
    shards: list[int],
    prepared: Prepared,
    config: GenerateConfig,
    meter: Meter,
    written: Callable[[int], None],
    note: Callable[[], None],
) -> None:
    """Draw, store and commit shards on a cluster."""
    if not shards:
        return
    import ray
    import ray.data

    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    if num_gpus is None:
        num_gpus = 1 if config.device != "cpu" and ray.cluster_resources().get("GPU", 0) else 0
    out = str(format.target)
    job = _Job(model, out if "://" in out else os.path.abspath(out), config, prepared.pipeline.hash)
    done = ray.data.from_items(
        [{"shard": shard} for shard in shards], override_num_blocks=min(len(shards), _BLOCKS)
    ).map_batches(
        ShardWriter,
        fn_constructor_args=(job,),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=n_workers, max_tasks_in_flight_per_actor=2),
        num_gpus=num_gpus,
    )  # actors are restarted and tasks repeated without end: Ray Data's own setting
    done.context.enable_progress_bars = done.context.print_on_execution_start = False
    meter.start_stages(drawing=n_workers)
    for row in done.iter_rows():
        if row["error"]:
            raise InputError(row["error"])
        meter.done += row["images"]
        written(row["images"])
        note()
