"""How generate's time grows with the plan and shrinks with ranks and Ray workers; what docs/scaling.md fits its model to.

Every run is the command line's, with the shipped model at 32 px and one thread a process, on a plan of two categories. Plans
of two sizes tell the start (Python, the model, the plan, the sheet) from the time of an image. The time of the stages is that of
``--metrics``. Rounds are interleaved; medians.

    OMP_NUM_THREADS=1 python benchmarks/bench_scaling.py --shots NOVEL_DIR [--sizes 256 2048] [--rounds 3] [--ray]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from statistics import median


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shots", type=Path, required=True, help="two categories")
    parser.add_argument(
        "--sizes", type=int, nargs=2, default=[256, 2048], help="images of the small and the large plan"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ray", action="store_true", help="Ray workers too")
    arguments = parser.parse_args()
    ways = [("ranks", 1), ("ranks", 2)] + [("ray", n) for n in (1, 2) if arguments.ray]
    seconds: dict[tuple[str, int, int], list[float]] = {}
    stages: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as whole:  # deleted at the end: ext4 is slow right after deletions
        for _ in range(arguments.rounds):
            for (way, count), n_images in product(ways, arguments.sizes):
                folder = Path(tempfile.mkdtemp(dir=whole))
                took = timed(arguments.shots, folder, way, count, n_images)
                seconds.setdefault((way, count, n_images), []).append(took)
                print(way, count, n_images, f"{took:.2f} s", flush=True)
                if (way, count, n_images) == ("ranks", 1, arguments.sizes[1]):
                    stages.append(stage_times(folder / "metrics", n_images))
    report(arguments.sizes, ways, seconds, stages)
    return 0


def timed(shots: Path, folder: Path, way: str, count: int, n_images: int) -> float:
    """Seconds of the wall clock from the start of the first process to the end of the last."""
    command = [sys.executable, "-m", "sage_fast.cli", "generate", "--shots", str(shots), "--out", str(folder / "out")]
    command += f"-n {n_images // 2} --shard 128 --batch 64 --device cpu --workers 1 --metrics {folder}/metrics".split()
    if way == "ray":
        command += ["--ray-workers", str(count)]
    start = time.monotonic()
    ranks = [
        subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | environment)
        for environment in (
            [{"RANK": str(rank), "WORLD_SIZE": str(count)} for rank in range(count)] if way == "ranks" else [{}]
        )
    ]
    if any([rank.wait() for rank in ranks]):
        raise SystemExit(f"a run of {count} {way} failed")
    return time.monotonic() - start


def stage_times(metrics: Path, n_images: int) -> dict[str, float]:
    """Microseconds an image that each stage was at work."""
    line = json.loads(metrics.read_text().splitlines()[-1])
    return {stage: share * line["seconds"] / n_images * 1e6 for stage, share in line["busy"].items()}


def report(
    sizes: list[int],
    ways: list[tuple[str, int]],
    seconds: dict[tuple[str, int, int], list[float]],
    stages: list[dict[str, float]],
) -> None:
    print(f"{'':10}{'s, ' + str(sizes[0]):>10}{'s, ' + str(sizes[1]):>10}{'start s':>10}{'images/s':>10}{'of one':>8}")
    alone = 0.0
    for way, count in ways:
        small, large = (median(seconds[way, count, n]) for n in sizes)
        pace = (large - small) / (sizes[1] - sizes[0])
        alone = alone or pace
        row = f"{small:10.2f}{large:10.2f}{small - pace * sizes[0]:10.2f}{1 / pace:10.0f}{alone / pace:8.2f}"
        print(f"{count} {way:8}{row}")
    shown = {stage: round(median(one[stage] for one in stages)) for stage in stages[0]}
    print("microseconds an image, one rank: " + ", ".join(f"{stage} {value}" for stage, value in shown.items()))


if __name__ == "__main__":
    raise SystemExit(main())
