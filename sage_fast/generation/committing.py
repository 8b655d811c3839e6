"""A shard is written when its part of the manifest is there; at the end the parts become the manifest.

While a run is under way, ``.sage_fast/parts/00000000.jsonl`` holds the lines of a shard, renamed into place after its
files are on the disk. ``manifest.jsonl`` comes last of all: where it is, the output is complete.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from sage_fast.errors import InputError
from sage_fast.generation.checksums import MANIFEST, PARQUET, SUMS, read_sums, write_sums
from sage_fast.generation.formats import Format, Stored
from sage_fast.generation.plan import Plan
from sage_fast.generation.stores import STATE, Store

__all__ = [
    "commit", "committed", "count_lines", "is_complete", "keep_parquet", "keeps_parquet", "line_of", "lines_of", "part_lines",
    "reopen", "write_manifest", "write_parquet",
]  # fmt: skip

_PARTS = f"{STATE}/parts"
_WITH_PARQUET = f"{STATE}/parquet"
_BLOCK = 10_000  # lines of Parquet that are in memory


def line_of(image: Stored) -> bytes:
    """The manifest's line of one image: where it is, and all that is needed to make it again."""
    category, index, source, *rest = image.about.items()
    own = {"file": image.file, "bytes": image.size, "sha256": image.sha256}
    content = dict([category, index]) | own | dict([source, *rest])
    return json.dumps(content, allow_nan=False).encode() + b"\n"


def commit(store: Store, shard: int, images: Iterable[Stored]) -> None:
    """The shard counts from now on. Its files must be closed."""
    store.sync()
    store.write(_part(shard), b"".join(line_of(image) for image in images))


def is_complete(store: Store) -> bool:
    """Whether every image of the output's plan is there."""
    return store.size(MANIFEST) is not None


def committed(store: Store, plan: Plan) -> set[int]:
    """Numbers of the shards that are written."""
    if is_complete(store):
        return set(range(plan.n_shards))
    names = [name.removesuffix(".jsonl") for name in store.names(_PARTS)]
    return {int(name) for name in names if name.isdigit()} & set(range(plan.n_shards))


def keep_parquet(store: Store) -> None:
    """Note in an output that is not complete that it is to have a Parquet file: whoever completes it may not ask for one."""
    store.write(_WITH_PARQUET, b"")


def keeps_parquet(store: Store) -> bool:
    """Whether the output has a Parquet file, or is to have one."""
    return any(store.size(name) is not None for name in (PARQUET, _WITH_PARQUET)) or PARQUET in (read_sums(store) or {})


def reopen(format: Format, without: Collection[int] = (), plan: Plan | None = None) -> None:
    """Take back the commits of some shards; what was complete is then not.

    Args:
        format: of the output as it is.
        without: numbers of shards.
        plan: of the output from now on; shards of which it makes something else are taken back too.
    """
    store, old = format.target, format.plan
    kept = committed(store, old) - set(without)
    if plan is not None:
        kept = {k for k in kept if k < plan.n_shards and _alike(old, plan, k)}
        if format.labelled:  # a new category can move the labels of those that were there
            kept = {k for k in kept if _labels(old, k) == _labels(plan, k)}
    if is_complete(store):
        lines = lines_of(store)
        for shard in range(old.n_shards):
            own = b"".join(islice(lines, len(old.positions(shard))))
            if shard in kept and format.separate and _is_of(own, old, shard):
                store.write(_part(shard), own)
        if keeps_parquet(store):
            keep_parquet(store)
            store.remove(PARQUET)
        store.remove(MANIFEST)
    else:
        for shard in committed(store, old) - kept:
            store.remove(_part(shard))
    store.remove(SUMS)


def lines_of(store: Store) -> Iterator[bytes]:
    """The lines of the finished manifest."""
    with store.reader(MANIFEST) as file:
        yield from file


def count_lines(store: Store) -> int:
    """Whole lines of the finished manifest."""
    with store.reader(MANIFEST) as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 22), b""))


def write_manifest(store: Store, plan: Plan, sums: Mapping[str, str]) -> dict[str, str]:
    """Join the parts, in their order; just before the manifest is there its digest is recorded with the others'.

    Args:
        sums: digests of the other files; returned with the manifest's.
    Raises:
        InputError: a part is damaged; it is taken back, so that a resumed run draws its shard again.
    """
    sha256 = hashlib.sha256()
    with store.writer(MANIFEST) as out:
        for shard in range(plan.n_shards):
            lines = store.read(_part(shard))
            if not _is_whole(lines, plan, shard):
                store.remove(_part(shard))
                raise InputError(f"The record of shard {shard} in {str(store)!r} was damaged; --resume draws it again.")
            out.write(lines)
            sha256.update(lines)
        recorded = dict(sums) | {MANIFEST: sha256.hexdigest()}
        write_sums(store, recorded)
    return recorded


def write_parquet(store: Store) -> None:
    """The finished manifest as a Parquet file, a block of lines at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    shot = pa.struct([("file", pa.string()), ("sha256", pa.string())])
    words = ("category", "file", "sha256", "source", "method", "fusion", "preset", "precision", "model", "version")
    numbers = ("index", "bytes", "seed", "n_components", "n_similar", "n_directions")
    fields = [(name, pa.string()) for name in words] + [(name, pa.int64()) for name in numbers]
    schema = pa.schema(
        [*fields, ("alpha", pa.float64()), ("shots", pa.list_(shot)), ("similar", pa.list_(pa.string()))]
    )
    lines = lines_of(store)
    with store.writer(PARQUET) as out, pq.ParquetWriter(out, schema) as table:
        while block := [json.loads(line) for line in islice(lines, _BLOCK)]:
            table.write_table(pa.Table.from_pylist(block, schema))


def part_lines(store: Store, shard: int) -> list[bytes]:
    """The lines of a committed shard of an output that is not complete."""
    return store.read(_part(shard)).splitlines(keepends=True)


def _is_whole(lines: bytes, plan: Plan, shard: int) -> bool:
    return lines.count(b"\n") == len(plan.positions(shard)) and lines.endswith(b"\n")


def _is_of(lines: bytes, plan: Plan, shard: int) -> bool:
    """Whether the lines are whole and each is of the image that stands there in the plan."""
    try:
        found = [(line["category"], line["index"]) for line in map(json.loads, lines.splitlines())]
    except (ValueError, TypeError, KeyError):
        return False
    wanted = [(part.category, index) for part, index in plan.images(plan.positions(shard))]
    return found == wanted and _is_whole(lines, plan, shard)


def _part(shard: int) -> str:
    return f"{_PARTS}/{shard:08d}.jsonl"


def _alike(old: Plan, new: Plan, shard: int) -> bool:
    """Whether both plans draw the same images in a shard, in the same micro-batches."""
    same = old.positions(shard) == new.positions(shard) and old.shard == new.shard and old.batch == new.batch
    return same and _stretches(old, shard) == _stretches(new, shard)


def _labels(plan: Plan, shard: int) -> list[int]:
    return [plan.labels[plan.parts[span.part].category] for span in plan.spans(plan.positions(shard))]


def _stretches(plan: Plan, shard: int) -> list[tuple[Any, ...]]:
    spans = plan.spans(plan.positions(shard))
    return [(plan.parts[span.part].category, plan.parts[span.part].first, span.first, span.n) for span in spans]
