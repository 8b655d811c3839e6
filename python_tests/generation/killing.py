"""Runs generations in forked processes and kills them with SIGKILL at random moments; prints what came of it as JSON.

A program of its own, so that it forks from one thread with torch loaded and warm: a start then takes milliseconds.

    python killing.py BUNDLE SHOTS FOLDER KILLS
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path

import torch

from sage_fast.generation import GenerateConfig, generate
from sage_fast.generation.verifying import verify
from sage_fast.pipeline import FewShotPipeline

CONFIGS = [
    GenerateConfig(n=40, batch=4, shard=8, fusion="pixel", workers=2),
    GenerateConfig(n=30, batch=5, shard=7, format="webdataset", image="jpg"),
    GenerateConfig(n=30, batch=4, shard=10, format="safetensors", method="age"),
]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name[0] != "."}


def start(pipeline, shots: Path, out: Path, config: GenerateConfig, rank: int, world_size: int) -> int:
    """Fork a rank; returns the process's number."""
    child = os.fork()
    if child:
        return child
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
    try:
        generate(pipeline, shots, out, config)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def run_whole(pipeline, shots: Path, out: Path, config: GenerateConfig, world_size: int) -> bool:
    """All ranks to their end; whether all ended well."""
    ranks = [start(pipeline, shots, out, config, rank, world_size) for rank in range(world_size)]
    return all(os.waitpid(rank, 0)[1] == 0 for rank in ranks)


def run_killed(
    pipeline, shots: Path, out: Path, config: GenerateConfig, world_size: int, seconds: float, rng: random.Random
) -> int:
    """Kill one rank at random, or all, at a random moment of a run that takes about ``seconds``; how many were running."""
    ranks = [start(pipeline, shots, out, config, rank, world_size) for rank in range(world_size)]
    victims = rng.sample(ranks, rng.randint(1, world_size))
    time.sleep(rng.uniform(0, 1.05 * seconds))
    for rank in victims:
        os.kill(rank, signal.SIGKILL)
    statuses = {rank: os.waitpid(rank, 0)[1] for rank in ranks}
    assert all(os.WIFSIGNALED(s) or os.WEXITSTATUS(s) == 0 for s in statuses.values()), statuses
    return sum(os.WIFSIGNALED(status) for status in statuses.values())


def main() -> None:
    bundle, shots, folder, wanted = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(1)
    rng = random.Random(int(sys.argv[5]) if len(sys.argv) > 5 else 0)
    pipeline = FewShotPipeline.from_bundle(bundle)
    expected, seconds = [], []
    for number, config in enumerate(CONFIGS):
        generate(pipeline, shots, folder / f"warm_{number}", config)
        begun = time.monotonic()
        assert run_whole(pipeline, shots, folder / f"whole_{number}", config, 1)
        seconds.append(time.monotonic() - begun)
        expected.append(contents(folder / f"whole_{number}"))
    kills, outputs, wrong = 0, 0, []
    while kills < wanted:
        number, out = outputs % len(CONFIGS), folder / f"killed_{outputs}"
        config = replace(CONFIGS[number], resume=True)
        for _ in range(rng.randint(1, 3)):
            kills += run_killed(pipeline, shots, out, config, rng.randint(1, 2), seconds[number], rng)
        ended = run_whole(pipeline, shots, out, config, rng.randint(1, 2))
        found = contents(out)
        problems = verify(out, workers=1).problems
        if not ended or found != expected[number] or problems or (out / ".sage_fast").exists():
            differing = sorted(k for k in found.keys() | expected[number] if found.get(k) != expected[number].get(k))
            wrong.append({"out": str(out), "ended": ended, "differing": differing, "problems": problems})
        outputs += 1
    print(json.dumps({"kills": kills, "outputs": outputs, "seconds": seconds, "wrong": wrong}))


if __name__ == "__main__":
    main()
