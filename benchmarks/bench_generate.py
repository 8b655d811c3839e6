"""Generation to disk, end to end: against its own stages alone, against the released scripts' way, on two ranks, and started
on ten million images.

Beside images a second stand milliseconds of processor time an image, which other programs on the machine hardly change. Every
stage alone gets the threads that it has in the pipeline: synthesis (with fusion and 8 bits) ``--threads``, encoding and
writing ``--workers``. Without ``--threads`` both share all cores. ``generate`` is timed as a whole: reading the shots,
commits, manifest, card and sheet are in it. The runs of a row are interleaved; medians.

The rival is written as the scripts of AGE and SAGE work: for every image the source is encoded anew, codes are drawn with
``np.random.multivariate_normal``, one image is synthesised and saved with Pillow. It uses the same networks; "plain" runs
them on plain PyTorch, as those scripts do.

    python benchmarks/bench_generate.py [--sizes 32 64 256] [--threads 1] [--workers 1] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from unittest import mock

import numpy as np
import torch
from PIL import Image

from sage_fast import _native
from sage_fast.data.latent_table import LatentTable
from sage_fast.data.writers import save_png
from sage_fast.factorization.category_irrelevant import CategoryIrrelevantDictionary
from sage_fast.factorization.category_relevant import CategoryRelevantDictionary
from sage_fast.generation import GenerateConfig, Meter, Prepared, generate
from sage_fast.generation.agreeing import choose_config_encoder
from sage_fast.generation.drawing import draw_images, draw_latents
from sage_fast.generation.formats import choose_format
from sage_fast.generation.run import plan_of
from sage_fast.generation.stores import make_state, open_store
from sage_fast.models.encoders import PyramidEncoder
from sage_fast.models.stylegan2 import Generator
from sage_fast.pipeline import FewShotPipeline

SIZES = {32: (2048, 128, 512), 64: (4096, 128, 512), 256: (16384, 512, 512)}  # channel_base, channel_max, style_dim
IMAGES = {32: 4096, 64: 1024, 256: 192}  # of a round, at full speed some seconds
N_SEEN, N_EACH, N_DIRECTIONS = 40, 20, 100
CATEGORIES = 2  # novel ones, of one shot each: encoding it is a small part, as it is of a long run
ROUNDS = 5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0: all cores")
    parser.add_argument("--workers", type=int, default=0, help="that encode and write; 0: as many")
    parser.add_argument("--image", default="png")
    parser.add_argument("--fusion", default="none")
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of images")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--skip", nargs="*", default=[], choices=["stages", "rival", "ranks", "start"])
    parser.add_argument(
        "--out", type=Path, default=None, help="folder on the disk to be measured; None: a temporary one"
    )
    parser.add_argument("--child", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.threads = options.threads or len(os.sched_getaffinity(0))
    options.workers = options.workers or options.threads
    torch.set_num_threads(options.threads)
    if options.child:
        return child(options)
    with tempfile.TemporaryDirectory(dir=options.out) as folder:
        rows = [row for size in options.sizes for row in measure(size, Path(folder), options)]
        if "start" not in options.skip:
            rows.append(start_of_ten_million(Path(folder), options))
    about = {"bench": "generate", "threads": options.threads, "workers": options.workers, "image": options.image}
    print(json.dumps(about | {"fusion": options.fusion, "torch": torch.__version__, "rows": rows}))
    return 0


def measure(size: int, folder: Path, options: argparse.Namespace) -> list[dict]:
    pipeline, shots = make_pipeline(size), make_shots(folder / f"shots_{size}", size)
    rows = []
    if "stages" not in options.skip:
        rows.append(against_stages(size, pipeline, shots, folder, options))
    if "rival" not in options.skip:
        rows.append(against_rival(size, pipeline, shots, folder, options))
    if "ranks" not in options.skip and size == min(options.sizes):
        rows.append(two_ranks(size, shots, folder, options))
    return rows


def make_pipeline(size: int) -> FewShotPipeline:
    """Networks of the usual sizes with random weights; the speed of none depends on what it has learned."""
    base, most, dim = SIZES[size]
    rng = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        generator = Generator(size, dim, n_mapping=2, channel_base=base, channel_max=most).eval().requires_grad_(False)
        encoder = PyramidEncoder(size, generator.n_latent, dim, channel_base=base, channel_max=most).eval()
    labels = torch.arange(N_SEEN).repeat_interleave(N_EACH)
    codes = LatentTable(
        torch.randn(len(labels), generator.n_latent, dim, generator=rng), labels, [f"s{i:02d}" for i in range(N_SEEN)]
    )
    directions = torch.linalg.qr(torch.randn(generator.n_latent, dim, N_DIRECTIONS, generator=rng))[0]
    relevant = CategoryRelevantDictionary(N_SEEN).fit(codes.w_plus, codes.labels)
    groups = [[layer] for layer in range(generator.n_latent)]
    irrelevant = CategoryIrrelevantDictionary(directions.contiguous(), groups)
    return FewShotPipeline(generator, encoder.requires_grad_(False), relevant, irrelevant, codes, hash=f"random {size}")


def make_shots(folder: Path, size: int, categories: int = CATEGORIES, each: int = 1) -> Path:
    rng = torch.Generator().manual_seed(1)
    for category in range(categories):
        (folder / f"c{category}").mkdir(parents=True)
        for i in range(each):
            coarse = torch.rand(1, 3, 4, 4, generator=rng) * 255
            image = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic").clamp(0, 255)
            save_png(folder / f"c{category}" / f"{i}.png", image.to(torch.uint8)[0], durable=False)
    return folder


def config_of(size: int, options: argparse.Namespace, **settings) -> GenerateConfig:
    n = max(2, round(IMAGES[size] * options.scale / CATEGORIES))
    return GenerateConfig(
        **{"n": n, "fusion": options.fusion, "image": options.image, "workers": options.workers, **settings}
    )


def against_stages(
    size: int, pipeline: FewShotPipeline, shots: Path, folder: Path, options: argparse.Namespace
) -> dict:
    """Images per second of the whole, and of synthesis and encoding by themselves."""
    config = config_of(size, options)
    plan = plan_of(pipeline, shots, config)
    prepared = Prepared(pipeline, plan)
    batches = [positions for shard in range(plan.n_shards) for positions in plan.batches(shard)]
    latents = [draw_latents(prepared, positions) for positions in batches]
    pixels = [draw_images(pipeline, one) for one in latents]
    encoder = choose_config_encoder(config, 3)

    def synthesis(_: Path) -> None:
        side_by_side(lambda one: draw_images(pipeline, one), latents, options.threads)

    def encoding(out: Path) -> None:
        store = open_store(out)
        store.prepare(resume=False)
        make_state(store)
        format = choose_format("folder", store, plan, encoder, (3, size, size))

        def write(number: int) -> None:
            images = format.pixels(pixels[number].numpy())
            for one in zip(batches[number], images, latents[number].about()):
                format.store(*one)

        side_by_side(write, range(len(batches)), options.workers)
        store.sync()

    meter = Meter()

    def whole(out: Path) -> None:
        generate(pipeline, shots, out, config, meter=meter)

    times = medians({"whole": whole, "synthesis": synthesis, "encoding": encoding}, folder, options.rounds)
    speeds = {name: len(plan) / seconds for name, (seconds, _) in times.items()}
    cpu = {name: 1e3 * seconds / len(plan) for name, (_, seconds) in times.items()}
    share = speeds["whole"] / min(speeds["synthesis"], speeds["encoding"])
    row = {"case": f"{size} px, {len(plan)} images", **{f"{k}_per_s": round(v, 1) for k, v in speeds.items()}}
    row |= {f"{name}_cpu_ms": round(value, 3) for name, value in cpu.items()}
    row |= {"whole_of_slower": round(share, 3), "encoder": encoder.name, "busy": meter.line()["busy"]}
    print(
        f"{row['case']:<24} {speeds['whole']:9.1f} images/s to disk; synthesis alone {speeds['synthesis']:.1f}, encoding and "
        f"writing alone {speeds['encoding']:.1f}: {share:.0%} of the slower; processor {cpu['whole']:.3f}, "
        f"{cpu['synthesis']:.3f}, {cpu['encoding']:.3f} ms"
    )
    return row


def side_by_side(function: Callable, items, threads: int) -> None:
    """Each item on one of so many threads, as the pipeline does it."""
    before = torch.get_num_threads()
    with ThreadPoolExecutor(threads, "bench", torch.set_num_threads, (1,)) as pool:
        for _ in pool.map(function, items):
            pass
    torch.set_num_threads(before)


def medians(calls: dict[str, Callable[[Path], None]], folder: Path, rounds: int) -> dict[str, tuple[float, float]]:
    """Seconds, and processor seconds, of each, interleaved, into a new folder each time."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name in list(calls)[:: 1 if number % 2 else -1]:
            out = folder / "measured"
            start, cpu = time.perf_counter(), time.process_time()
            calls[name](out)
            times[name].append((time.perf_counter() - start, time.process_time() - cpu))
            shutil.rmtree(out, ignore_errors=True)
    # the first round warms up
    return {name: (median(t for t, _ in own[1:]), median(c for _, c in own[1:])) for name, own in times.items()}


def against_rival(size: int, pipeline: FewShotPipeline, shots: Path, folder: Path, options: argparse.Namespace) -> dict:
    """Images per second of the released scripts' way, with our kernels and with plain PyTorch."""
    config = config_of(size, options)
    n = max(4, config.n // 32)
    sources = sorted(shots.glob("*/*.png"))

    def plain(out: Path) -> None:
        with mock.patch.object(_native, "has_kernel", lambda *_: False):
            released_way(pipeline, sources, n, out)

    seconds = medians(
        {
            "whole": lambda out: generate(pipeline, shots, out, config),
            "rival": lambda out: released_way(pipeline, sources, n, out),
            "plain": plain,
        },
        folder,
        options.rounds,
    )
    counts = {"whole": CATEGORIES * config.n, "rival": n, "plain": n}
    speed = {name: counts[name] / wall for name, (wall, _) in seconds.items()}
    cpu = {name: 1e3 * cpu / counts[name] for name, (_, cpu) in seconds.items()}
    row = {"case": f"{size} px against the released way", **{f"{k}_per_s": round(v, 2) for k, v in speed.items()}}
    row |= {f"{name}_cpu_ms": round(value, 3) for name, value in cpu.items()}
    row |= {f"times_{name}": round(speed["whole"] / speed[name], 1) for name in ("rival", "plain")}
    print(
        f"{row['case']:<36} {speed['whole']:9.1f} images/s; {speed['rival']:.2f} with our kernels ({row['times_rival']}x), "
        f"{speed['plain']:.2f} with plain PyTorch ({row['times_plain']}x); processor {cpu['whole']:.2f}, {cpu['rival']:.2f}, "
        f"{cpu['plain']:.2f} ms"
    )
    return row


def released_way(pipeline: FewShotPipeline, sources: list[Path], n: int, out: Path) -> None:
    """One image at a time: read and encode the source, draw codes, edit, synthesise, save."""
    out.mkdir(parents=True)
    editor = pipeline._editor("age", 1, {})
    codes = editor.codes_.numpy()  # [M, L, K]
    groups = [codes[:, :3].mean(1), codes[:, 3:6].mean(1)]
    means, covariances = [g.mean(0) for g in groups], [np.cov(g.T) for g in groups]
    directions = pipeline.irrelevant.directions
    G = pipeline.generator
    for j in range(n):
        source = torch.from_numpy(np.array(Image.open(sources[j % len(sources)]).convert("RGB"))).permute(2, 0, 1)
        w_plus = pipeline.embed(source[None])
        for group, layers in enumerate((slice(0, 3), slice(3, 6))):
            code = np.random.multivariate_normal(means[group], covariances[group]).astype(np.float32)
            w_plus[:, layers] += directions[layers] @ torch.from_numpy(code)
        with torch.no_grad():
            image = G(w_plus + G.latent_avg, noise=pipeline.noise)[0]
        pixels = ((image.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(out / f"{j}.png")


def two_ranks(size: int, shots: Path, folder: Path, options: argparse.Namespace) -> dict:
    """Two processes of one thread against one of two threads; each says when it began and ended to draw."""

    def run(world_size: int, threads: int, out: Path) -> float:
        words = [
            sys.executable,
            __file__,
            f"--threads={threads}",
            f"--workers={threads}",
            f"--scale={options.scale * 2}",
        ]
        words += [f"--image={options.image}", "--child", "rank", str(size), str(shots), str(out)]
        environments = [os.environ | {"RANK": str(r), "WORLD_SIZE": str(world_size)} for r in range(world_size)]
        ranks = [subprocess.Popen(words, env=e, stdout=subprocess.PIPE, text=True) for e in environments]
        times = [json.loads(rank.communicate()[0].splitlines()[-1]) for rank in ranks]
        return max(end for _, end in times) - min(begin for begin, _ in times)

    seconds: dict[str, list[float]] = {"one": [], "two": []}
    for number in range(max(3, options.rounds // 2)):
        seconds["one"].append(run(1, 2, folder / f"one_{number}"))
        seconds["two"].append(run(2, 1, folder / f"two_{number}"))
    one, two = (median(values) for values in seconds.values())
    row = {"case": f"{size} px, two ranks", "one_rank_s": round(one, 2), "two_ranks_s": round(two, 2)}
    row["two_of_one"] = round(one / two, 3)
    print(f"{row['case']:<24} two ranks of one thread have {one / two:.0%} of the speed of one rank of two threads")
    return row


def start_of_ten_million(folder: Path, options: argparse.Namespace) -> dict:
    """Seconds and memory from the call, and from the start of the process, until the first image is stored."""
    shots = make_shots(folder / "shots_start", 32, categories=100)
    words = [
        sys.executable,
        __file__,
        f"--threads={options.threads}",
        f"--workers={options.workers}",
        "--child",
        "start",
    ]
    done = subprocess.run(
        [*words, "32", str(shots), str(folder / "start")], stdout=subprocess.PIPE, text=True, check=True
    )
    row = {"case": "10,000,000 images of 100 categories", **json.loads(done.stdout.splitlines()[-1])}
    print(f"{row['case']:<40} first image {row['call_s']} s after the call, {row['process_s']} s after the start of the "
          f"process, {row['peak_mib']} MiB at most in the first {row['seconds']} s")  # fmt: skip
    return row


def child(options: argparse.Namespace) -> int:
    kind, size, shots, out = options.child[0], int(options.child[1]), Path(options.child[2]), Path(options.child[3])
    pipeline = make_pipeline(size)
    if kind == "rank":
        config = config_of(size, options)
        begin = time.time()
        generate(pipeline, shots, out, config)
        print(json.dumps([begin, time.time()]))
        return 0
    called, first = time.monotonic(), []

    class Enough(Exception):
        pass

    def progress(done: int, total: int) -> None:
        first.append(time.monotonic())
        assert total == 10**7
        if time.monotonic() - called > 8:
            raise Enough

    try:
        generate(pipeline, shots, out, GenerateConfig(n=100_000, workers=options.workers), progress)
    except Enough:
        pass
    begun = time.clock_gettime(time.CLOCK_BOOTTIME) - process_age()
    now = time.clock_gettime(time.CLOCK_BOOTTIME) - time.monotonic()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({
        "call_s": round(first[0] - called, 2), "process_s": round(first[0] + now - begun, 2),
        "peak_mib": round(peak), "seconds": round(time.monotonic() - called, 1),
    }))  # fmt: skip
    return 0


def process_age() -> float:
    """Seconds since this process was started."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    sys.exit(main())
