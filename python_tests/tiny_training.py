"""Each trainer at 8 px with everything that a checkpoint must hold, as functions that a process can run."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
from pathlib import Path
from typing import Any

import torch

from sage_fast.data.folders import ImageSet
from sage_fast.models.perceptual import DiscriminatorFeatures
from sage_fast.models.stylegan2 import Discriminator, Generator
from sage_fast.training.classifier import ClassifierConfig, train_classifier
from sage_fast.training.dictionary import DictionaryConfig, train_dictionary
from sage_fast.training.encoder import EncoderConfig, train_encoder
from sage_fast.training.gan import GANConfig, train_gan
from sage_fast.training.logs import TrainingLog

SIZES = {"channel_base": 64, "channel_max": 8}
EACH = {"log_every": 1, "save_every": 3, "grid_every": 1000}
GAN = GANConfig(
    8, style_dim=8, n_mapping=2, batch=4, total_kimg=0.12, r1_every=2, pl_weight=2.0, pl_every=2, **SIZES, **EACH
)
ENCODER = EncoderConfig(total_steps=30, batch=4, lr=0.01, warmup=2, head_width=4, **SIZES, **EACH)
TUNED = dataclasses.replace(ENCODER, tune_generator=True, r1_every=2)
DICTIONARY = DictionaryConfig(n_directions=6, total_steps=60, batch=8, lr=0.01, **EACH)
CLASSIFIER = ClassifierConfig(total_steps=20, batch=8, width=4, lr=0.01, warmup=2, log_every=1, save_every=3)


def images() -> ImageSet:
    """40 random images of two categories."""
    pixels = torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return ImageSet(pixels, torch.arange(40) % 2, ["a", "b"], [f"{i}.png" for i in range(40)], [])


def networks() -> tuple[Generator, Discriminator]:
    """A generator and a discriminator, the same at every call."""
    torch.manual_seed(1)
    G, D = Generator(8, 8, 2, 3, **SIZES), Discriminator(8, 3, **SIZES)
    G.latent_avg.copy_(G.mean_latent(100))
    return G, D


def train(name: str, folder: Path, config: Any = None) -> dict[str, torch.Tensor]:
    """Train, or go on, until the end; returns the weights."""
    config = config or {"gan": GAN, "encoder": TUNED, "dictionary": DICTIONARY, "classifier": CLASSIFIER}[name]
    data, (G, D) = images(), networks()
    if name == "gan":
        G, D = train_gan(config, data.images, folder, resume=True)
        return {f"G.{k}": v for k, v in G.state_dict().items()} | {f"D.{k}": v for k, v in D.state_dict().items()}
    if name == "encoder":
        E = train_encoder(config, data, G, D, folder, resume=True)
        return {f"E.{k}": v for k, v in E.state_dict().items()} | {f"G.{k}": v for k, v in G.state_dict().items()}
    if name == "classifier":
        return train_classifier(config, data.images, data.labels, folder, resume=True).state_dict()
    w_plus = torch.randn(40, G.n_latent, 8, generator=torch.Generator().manual_seed(2)).to(G.latent_avg)
    features = DiscriminatorFeatures(D)
    dictionary = train_dictionary(config, w_plus, data.labels, data, G, features, folder, resume=True)
    return {"directions": dictionary.directions}


def train_to_file(name: str, folder: Path) -> None:
    """Train to the end, then write the weights."""
    weights = train(name, folder)
    torch.save(weights, folder / "weights.pt")


def die_while_saving(name: str, folder: Path, call: str, number: int) -> None:
    """Train, and be killed in the ``number``-th call of ``os.<call>``, all of which belong to writing files."""
    real, calls = getattr(os, call), iter(range(10**6))

    def fatal(*args: Any, **named: Any) -> Any:
        if next(calls) == number:
            if call == "write":
                real(args[0], bytes(args[1])[: len(args[1]) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **named)

    setattr(os, call, fatal)
    train(name, folder)


def die_after_step(name: str, folder: Path, step: int, seconds: float) -> None:
    """Train, and be killed ``seconds`` after ``step`` was logged, wherever the run is then."""
    real = TrainingLog.write

    def write(log: TrainingLog, now: int, values: Any) -> dict[str, float]:
        written = real(log, now, values)
        if now == step:
            threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return written

    TrainingLog.write = write  # type: ignore[method-assign]
    train(name, folder)


def train_with_ranks(name: str, folder: Path, config: Any, dtype: torch.dtype) -> None:
    """Train as one rank of several, in one dtype throughout."""
    from sage_fast.training.ranks import join_ranks

    torch.set_default_dtype(dtype)
    with join_ranks():
        train(name, folder, config)


def equal_on_all_ranks(name: str, folder: Path, config: Any) -> None:
    """Train as one rank of several; all must have the same weights in the end."""
    from sage_fast.training.ranks import join_ranks

    with join_ranks() as ranks:
        first, *others = ranks.gather(dict(train(name, folder, config)))
        assert all(torch.equal(first[key], other[key]) for other in others for key in first), "weights differ"
