"""Generation to disk, end to end: against its own stages alone, against the released scripts' way, on two ranks, and started
on ten million images.

Beside images a second stand milliseconds of processor time an image, which other programs on the machine hardly change. Every
stage alone gets the cores that it has in the pipeline: synthesis (with fusion and 8 bits) ``--threads`` of them, encoding and
writing the other ``--workers``. (Alone on all cores each would have cores that in the pipeline the other needs, and no
pipeline could come near the slower of the two.) How well all cores are used together says the share that synthesis and
encoding alone have in the processor time of the whole. ``generate`` is timed as a whole: reading the shots, commits,
manifest, card and sheet are in it. The runs of a row are interleaved; medians.

The rival is written as the scripts of AGE and SAGE work: for every image the source is encoded anew, codes are drawn with
``np.random.multivariate_normal``, one image is synthesised and saved with Pillow. It uses the same networks (its encoder is
smaller than theirs); "plain" runs them on plain PyTorch, as those scripts do.
``generate`` has all cores, and so has the rival unless one thread is faster.

OPENBLAS_NUM_THREADS=1 spares its small matrices threads that only wait for one another where other programs run too.

On a GPU (``--device cuda``) the stages alone are measured: synthesis there, with the copy of its 8-bit images to the host. With
``--encoder nvjpeg`` nothing but files is copied: synthesis alone leaves its images on the GPU, encoding alone begins with them.

    python benchmarks/bench_generate.py [--sizes 32 64 256] [--threads 1] [--workers 1] [--out FOLDER] [--device cpu]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from statistics import median
from unittest import mock

import numpy as np
import torch
from PIL import Image

from sage_fast import _native
from sage_fast.arithmetic import DRAWING_PRECISIONS, float32_products
from sage_fast.data.latent_table import LatentTable
from sage_fast.data.writers import save_png
from sage_fast.factorization.category_irrelevant import CategoryIrrelevantDictionary
from sage_fast.factorization.category_relevant import CategoryRelevantDictionary
from sage_fast.generation import GenerateConfig, Meter, Prepared, generate
from sage_fast.generation.agreeing import choose_config_encoder
from sage_fast.generation.drawing import Latents, draw_images, draw_latents
from sage_fast.generation.formats import choose_format
from sage_fast.generation.run import plan_of
from sage_fast.generation.stores import make_state, open_store
from sage_fast.models.encoders import PyramidEncoder
from sage_fast.models.stylegan2 import Generator
from sage_fast.pipeline import FewShotPipeline

SIZES = {32: (2048, 128, 512), 64: (4096, 128, 512), 256: (16384, 512, 512)}  # channel_base, channel_max, style_dim
IMAGES = {32: 4096, 64: 1024, 256: 256}  # of a round, at full speed some seconds
N_SEEN, N_EACH, N_DIRECTIONS = 40, 20, 100
CATEGORIES = 2  # novel ones, of one shot each: encoding it is a small part, as it is of a long run
ROUNDS = 5
SECONDS = 8  # that a plan of ten million images runs before its memory is read
CORES = len(os.sched_getaffinity(0))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--threads", type=int, default=0, help="that draw; 0: half of the cores")
    parser.add_argument("--workers", type=int, default=0, help="that encode and write; 0: the other cores")
    parser.add_argument("--image", default="png")
    parser.add_argument("--encoder", default="auto", help="of the images: auto, pillow, opencv, simplejpeg or nvjpeg")
    parser.add_argument("--fusion", default="none")
    parser.add_argument("--precision", default="float32", choices=DRAWING_PRECISIONS, help="of the synthesis")
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of images")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="of the networks")
    parser.add_argument("--skip", nargs="*", default=[], choices=["stages", "rival", "memory", "ranks", "start"])
    parser.add_argument(
        "--out", type=Path, default=None, help="folder on the disk to be measured; None: a temporary one"
    )
    parser.add_argument("--child", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device.type != "cpu":
        options.skip = ["rival", "memory", "ranks", "start"]
    options.threads = options.threads or max(1, CORES // 2)
    options.workers = options.workers or max(1, CORES - options.threads)
    torch.set_num_threads(options.threads)
    if options.child:
        return child(options)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.out) as folder:
        rows = [row for size in options.sizes for row in measure(size, Path(folder), options)]
        if "start" not in options.skip:
            rows.append(start_of_ten_million(Path(folder), options))
    about = {"bench": "generate", "threads": options.threads, "workers": options.workers, "image": options.image}
    about["encoder"] = options.encoder
    about["device"] = torch.cuda.get_device_name(options.device) if options.device.type == "cuda" else "cpu"
    about["precision"] = options.precision
    print(json.dumps(about | {"fusion": options.fusion, "torch": torch.__version__, "rows": rows}))
    return 0


def measure(size: int, folder: Path, options: argparse.Namespace) -> list[dict]:
    pipeline = make_pipeline(size, options.device, options.precision)
    shots, rows = make_shots(folder / f"shots_{size}", size), []
    if "stages" not in options.skip:
        with float32_products(options.precision):  # of the stages alone, as of the whole
            rows.append(against_stages(size, pipeline, shots, folder, options))
    if "rival" not in options.skip:
        rows.append(against_rival(size, pipeline, shots, folder, options))
    if "memory" not in options.skip:
        rows.append(peak_of(size, shots, folder, options))
    if "ranks" not in options.skip and size == min(options.sizes):
        rows.append(two_ranks(size, shots, folder, options))
    return rows


def make_pipeline(size: int, device: torch.device = torch.device("cpu"), precision: str = "float32") -> FewShotPipeline:
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
    generator, encoder = generator.to(device), encoder.requires_grad_(False).to(device)
    parts = generator, encoder, relevant, irrelevant, codes
    return FewShotPipeline(*parts, hash=f"random {size}", precision=precision, inversion_device=inversion(device))


def inversion(device: torch.device) -> str:
    """Where the few shots are inverted: on a GPU, if there is one, in no time, as it takes next to none of a long run."""
    return "cpu" if device.type == "cpu" else "model"


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
    given = {name: getattr(options, name) for name in ("fusion", "image", "encoder", "workers", "precision")}
    return GenerateConfig(**{"n": n, "inversion_device": inversion(options.device), **given, **settings})


def against_stages(
    size: int, pipeline: FewShotPipeline, shots: Path, folder: Path, options: argparse.Namespace
) -> dict:
    """Images per second of the whole, and of synthesis and encoding by themselves."""
    config = config_of(size, options)
    plan = plan_of(pipeline, shots, config)
    prepared = Prepared(pipeline, plan)
    batches = [positions for shard in range(plan.n_shards) for positions in plan.batches(shard)]
    latents = [draw_latents(prepared, positions) for positions in batches]
    encoder = choose_config_encoder(config, pipeline)
    stay = encoder.encode_batch is not None  # on the device, where they are encoded

    def draw(one: Latents) -> torch.Tensor:
        images = draw_images(pipeline, one)
        return images if stay else images.cpu()

    drawn = [draw(one) for one in latents]

    def synthesis(_: Path) -> None:
        side_by_side(draw, latents, options.threads)
        if stay:
            torch.cuda.synchronize(options.device)

    def encoding(out: Path) -> None:
        store = open_store(out)
        store.prepare(resume=False)
        make_state(store)
        format = choose_format("folder", store, plan, encoder, (3, size, size))

        def write(number: int) -> None:
            contents = format.contents(drawn[number])
            for one in zip(batches[number], contents, latents[number].about()):
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
    of_processor = (cpu["synthesis"] + cpu["encoding"]) / cpu["whole"]
    row |= {"whole_of_slower": round(share, 3), "stages_of_processor": round(of_processor, 3)}
    row |= {"encoder": encoder.name, "busy": meter.line()["busy"]}
    print(
        f"{row['case']:<24} {speeds['whole']:9.1f} images/s to disk; synthesis alone {speeds['synthesis']:.1f}, encoding and "
        f"writing alone {speeds['encoding']:.1f}: {share:.0%} of the slower; processor {cpu['whole']:.3f} ms, of which "
        f"{cpu['synthesis']:.3f} and {cpu['encoding']:.3f} alone: {of_processor:.0%}"
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
    """Seconds, and processor seconds, of each, interleaved, into a new folder each time, which stays.

    ext4 looks at every inode that was freed within the last minute before it takes another: files that are made right after
    as many were deleted took 0.5 ms each here, and 0.02 ms where nothing had been deleted.
    """
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name in list(calls)[:: 1 if number % 2 else -1]:
            out = Path(tempfile.mkdtemp(dir=folder)) / "measured"
            start, cpu = time.perf_counter(), time.process_time()
            calls[name](out)
            times[name].append((time.perf_counter() - start, time.process_time() - cpu))
    # the first round warms up
    return {name: (median(t for t, _ in own[1:]), median(c for _, c in own[1:])) for name, own in times.items()}


def against_rival(size: int, pipeline: FewShotPipeline, shots: Path, folder: Path, options: argparse.Namespace) -> dict:
    """Images per second of the released scripts' way, with our kernels and with plain PyTorch."""
    config = replace(config_of(size, options), workers=CORES)
    n = max(8, config.n // 32)
    sources = sorted(shots.glob("*/*.png"))

    torch.set_num_threads(CORES)
    rival_threads = fewest_seconds(lambda out: released_way(pipeline, sources, 4, out), folder)

    def rival(out: Path) -> None:
        torch.set_num_threads(rival_threads)
        released_way(pipeline, sources, n, out)
        torch.set_num_threads(CORES)

    def plain(out: Path) -> None:
        with mock.patch.object(_native, "has_kernel", lambda *_: False):
            rival(out)

    seconds = medians(
        {
            "whole": lambda out: generate(pipeline, shots, out, config),
            "rival": rival,
            "plain": plain,
        },
        folder,
        options.rounds,
    )
    torch.set_num_threads(options.threads)
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


def fewest_seconds(call: Callable[[Path], None], folder: Path) -> int:
    """The number of threads, one or all cores, that a call takes less time with; it writes into a folder of ``folder``."""
    seconds = dict.fromkeys((1, CORES), float("inf"))
    for threads in 2 * list(seconds):
        torch.set_num_threads(threads)
        start = time.perf_counter()
        call(Path(tempfile.mkdtemp(dir=folder)) / "probe")
        seconds[threads] = min(seconds[threads], time.perf_counter() - start)
    torch.set_num_threads(CORES)
    return min(seconds, key=seconds.__getitem__)


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
        words = child_words(size, shots, out, options, threads, options.scale * 2)
        environments = [os.environ | {"RANK": str(r), "WORLD_SIZE": str(world_size)} for r in range(world_size)]
        ranks = [subprocess.Popen(words, env=e, stdout=subprocess.PIPE, text=True) for e in environments]
        times = [json.loads(rank.communicate()[0].splitlines()[-1]) for rank in ranks]
        return max(end for _, end, _ in times) - min(begin for begin, _, _ in times)

    seconds: dict[str, list[float]] = {"one": [], "two": []}
    for number in range(max(3, options.rounds // 2)):
        seconds["one"].append(run(1, 2, folder / f"one_{number}"))
        seconds["two"].append(run(2, 1, folder / f"two_{number}"))
    one, two = (median(values) for values in seconds.values())
    row = {"case": f"{size} px, two ranks", "one_rank_s": round(one, 2), "two_ranks_s": round(two, 2)}
    row["two_of_one"] = round(one / two, 3)
    print(f"{row['case']:<24} two ranks of one thread have {one / two:.0%} of the speed of one rank of two threads")
    return row


def peak_of(size: int, shots: Path, folder: Path, options: argparse.Namespace) -> dict:
    """Most memory of a process that makes the networks and draws with all cores."""
    words = child_words(size, shots, folder / f"peak_{size}", options, CORES, options.scale / 2)
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    row = {"case": f"{size} px, memory", "peak_mib": json.loads(done.stdout.splitlines()[-1])[2] >> 20}
    print(f"{row['case']:<24} {row['peak_mib']} MiB at most, Python, PyTorch and the networks included")
    return row


def child_words(
    size: int, shots: Path, out: Path, options: argparse.Namespace, threads: int, scale: float
) -> list[str]:
    words = [sys.executable, __file__, f"--threads={threads}", f"--workers={threads}", f"--scale={scale}"]
    words += [f"--image={options.image}", f"--encoder={options.encoder}", f"--precision={options.precision}"]
    return [*words, "--child", str(size), str(shots), str(out)]


def start_of_ten_million(folder: Path, options: argparse.Namespace) -> dict:
    """Seconds from the start of ``sage-fast generate`` to its first image, and its memory until ``SECONDS`` later.

    With the shipped model. Beside it what a Python that imports torch alone takes, right before.
    """
    shots = make_shots(folder / "shots_start", 32, categories=100)
    out = folder / "start"
    words = [sys.executable, "-m", "sage_fast.cli", "generate", f"--shots={shots}", f"--out={out}", "-n", "100000"]
    words += [
        "--device=cpu",
        f"--image={options.image}",
        f"--encoder={options.encoder}",
        f"--workers={options.workers}",
    ]
    begin = time.monotonic()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    alone, begin = time.monotonic() - begin, time.monotonic()
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, env=environment)
    try:
        while not any(out.glob(f"*/*.{options.image}")):
            if process.poll() is not None:
                raise SystemExit("the run of ten million images ended")
            time.sleep(0.01)
        first = time.monotonic() - begin
        time.sleep(SECONDS)
        peak = peak_memory(process.pid)
    finally:
        process.kill()
        process.wait()
    row = {"case": "10,000,000 images of 100 categories", "first_image_s": round(first, 2)}
    row |= {"import_torch_s": round(alone, 2), "peak_mib": round(peak / 2**20)}
    print(f"{row['case']:<40} first image {first:.2f} s after the start of the process (a bare import of torch: {alone:.2f} s); "
          f"{row['peak_mib']} MiB at most until {SECONDS} s later")  # fmt: skip
    return row


def peak_memory(pid: int | str) -> int:
    """Most bytes of memory that a process has had."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) << 10


def child(options: argparse.Namespace) -> int:
    """One run in a process of its own: when it began and ended, and its peak of memory."""
    size, shots, out = int(options.child[0]), Path(options.child[1]), Path(options.child[2])
    pipeline, config = make_pipeline(size, precision=options.precision), config_of(size, options)
    begin = time.time()
    generate(pipeline, shots, out, config)
    print(json.dumps([begin, time.time(), peak_memory("self")]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
