"""Whole trainings against stylegan2-ada-pytorch: seconds a thousand images, and quality after equally many, over seeds.

    python benchmarks/train_against_ada.py --peer-path CLONE --data SEEN --out DIR --features oracle --kimg 16 --seeds 0 1 2
    python benchmarks/train_against_ada.py --peer-path CLONE --data SEEN --out DIR --sizes 32s 64s --kimg 0.5

Both train networks of the same sizes with the same settings (logistic loss, R1 every sixteenth step, no path length, style
mixing, averaging, learning rates) from the same images in memory, in turns, in this process. Theirs is their networks and their
``StyleGAN2Loss``, with the loop around it written here as their ``training_loop`` has it, since that asks for CUDA; it draws new
fakes for the discriminator's update, ours shows it the generator's. Time is the processor time of the loop (on one thread that
of a quiet machine), without measurements. Quality is measured by ``evaluation.quality`` for both, on images held out by a hash
of their names; their averaged generator is read by ``load_generator``. The last line is JSON.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import resource
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from peers import _imports_from
from safetensors.torch import save_file

from sage_fast.data.folders import ImageSet
from sage_fast.data.splits import hold_out
from sage_fast.evaluation.quality import Quality, QualityConfig, load_features
from sage_fast.models.stylegan2 import Generator
from sage_fast.models.weights import load_generator
from sage_fast.training.gan import GANConfig, train_gan
from sage_fast.training.stages import read_seen

#: resolution, channel base, most channels, style width, layers of the mapping
SIZES = {
    "flora": (32, 1024, 96, 64, 4),
    "32s": (32, 2048, 128, 512, 8),
    "64s": (64, 4096, 128, 512, 8),
}


def settings(size: str, kimg: float, seed: int, precision: str) -> GANConfig:
    resolution, base, most, width, depth = SIZES[size]
    return GANConfig(
        resolution=resolution,
        style_dim=width,
        n_mapping=depth,
        channel_base=base,
        channel_max=most,
        total_kimg=kimg,
        style_mixing=0.9,
        precision=precision,
        seed=seed,
        save_every=10**9,
        grid_every=10**9,
        log_every=10**9,
    )


def train_ours(config: GANConfig, images: ImageSet, folder: Path) -> tuple[Generator, float]:
    start = time.process_time()
    generator, _ = train_gan(config, images, folder)
    return generator, time.process_time() - start


def train_theirs(config: GANConfig, images: ImageSet, folder: Path, clone: Path) -> tuple[Generator, float]:
    torch.manual_seed(config.seed)
    size: dict[str, Any] = dict(c_dim=0, img_resolution=config.resolution, img_channels=config.n_channels)
    blocks = dict(channel_base=config.channel_base, channel_max=config.channel_max, num_fp16_res=0)
    width = dict(z_dim=config.style_dim, w_dim=config.style_dim, mapping_kwargs={"num_layers": config.n_mapping})
    with _imports_from(clone):
        networks = importlib.import_module("training.networks")
        loss_type = importlib.import_module("training.loss").StyleGAN2Loss
        G = networks.Generator(**width, **size, synthesis_kwargs=blocks).train().requires_grad_(False)
        D = networks.Discriminator(**size, **blocks, epilogue_kwargs={"mbstd_group_size": config.mbstd_group})
        average = copy.deepcopy(G).eval()
    D.train().requires_grad_(False)
    loss = loss_type(
        torch.device("cpu"), G.mapping, G.synthesis, D, None, config.style_mixing, config.gamma, pl_weight=0.0
    )
    lazy = config.r1_every / (config.r1_every + 1)
    g_optim = torch.optim.Adam(G.parameters(), config.lr, (0.0, 0.99), 1e-8)
    d_optim = torch.optim.Adam(D.parameters(), config.lr * lazy, (0.0, 0.99**lazy), 1e-8)
    phases = [("Gmain", G, g_optim, 1), ("Dmain", D, d_optim, 1), ("Dreg", D, d_optim, config.r1_every)]
    no_labels = torch.zeros(config.batch, 0)

    start = time.process_time()
    for step in range(round(config.total_kimg * 1000 / config.batch)):
        index = torch.randint(len(images), (config.batch,))
        real = images.images[index].float() / 127.5 - 1
        real = torch.where(torch.rand(config.batch, 1, 1, 1) < 0.5, real.flip(3), real)
        for name, module, optim, every in phases:
            if step % every:
                continue
            optim.zero_grad(set_to_none=True)
            module.requires_grad_(True)
            z = torch.randn(config.batch, config.style_dim)
            loss.accumulate_gradients(name, real, no_labels, z, no_labels, sync=True, gain=every)
            module.requires_grad_(False)
            for p in module.parameters():
                if p.grad is not None:
                    torch.nan_to_num(p.grad, nan=0.0, posinf=1e5, neginf=-1e5, out=p.grad)
            optim.step()
        shown = step * config.batch
        kept = 0.5 ** (config.batch / max(min(config.ema_kimg * 1000, shown * config.ema_rampup), 1e-8))
        for ours, theirs in zip(average.parameters(), G.parameters()):
            ours.copy_(theirs.lerp(ours, kept))
        for ours, theirs in zip(average.buffers(), G.buffers()):
            ours.copy_(theirs)
    seconds = time.process_time() - start

    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.detach().clone().contiguous() for name, value in average.state_dict().items()}
    save_file(state, folder / "average.safetensors")
    return load_generator(folder / "average.safetensors"), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-path", type=Path, required=True, help="clone of stylegan2-ada-pytorch")
    parser.add_argument("--data", type=Path, required=True, help="folder of categories")
    parser.add_argument("--out", type=Path, required=True, help="new folder for runs")
    parser.add_argument(
        "--features", help="network of the scores, as in sage-fast quality; without it only time is measured"
    )
    parser.add_argument("--kimg", type=float, default=0.5)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["flora"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = [row for size in options.sizes for row in compare(size, options)]
    print(json.dumps({"benchmark": "train_against_ada", "rows": rows, "summary": summary(rows)}))


def compare(size: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row a seed and trainer; the trainers take turns, so that a change of clock meets both."""
    images = read_seen(options.data, SIZES[size][0])
    quality: Quality | None = None
    if options.features:
        images, held_out = hold_out(images)
        quality = Quality(QualityConfig(), held_out.images, load_features(options.features))
    rows = []
    for seed in options.seeds:
        for who, precision in (("ours", "float32"), ("ours", "bfloat16"), ("ada", "float32")):
            config, folder = (
                settings(size, options.kimg, seed, precision),
                options.out / f"{size}-{who}-{precision}-{seed}",
            )
            if who == "ours":
                generator, seconds = train_ours(config, images, folder)
            else:
                generator, seconds = train_theirs(config, images, folder, options.peer_path)
            row = {"size": size, "who": who, "precision": precision, "seed": seed, "kimg": options.kimg}
            row |= {"s_per_kimg": round(seconds / options.kimg, 3), **(quality(generator) if quality else {})}
            row["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Medians over seeds of each trainer's scores, and how many times our s/kimg theirs is."""
    found: dict[str, dict[str, float]] = {}
    for size, who, precision in dict.fromkeys((row["size"], row["who"], row["precision"]) for row in rows):
        mine = [row for row in rows if (row["size"], row["who"], row["precision"]) == (size, who, precision)]
        names = [name for name in mine[0] if name not in ("size", "who", "precision", "seed", "kimg", "peak_mib")]
        found[f"{size} {who} {precision}"] = {name: statistics.median(row[name] for row in mine) for name in names}
    for name, row in found.items():
        if " ours " in name:
            row["ada_takes"] = round(found[f"{name.split()[0]} ada float32"]["s_per_kimg"] / row["s_per_kimg"], 2)
    return found


if __name__ == "__main__":
    main()
