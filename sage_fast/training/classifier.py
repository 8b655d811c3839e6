"""Train a classifier of images, and the loop that it shares with every network trained on a plain loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sage_fast.arithmetic import PRECISIONS, autocast
from sage_fast.data.resuming import data_fingerprint
from sage_fast.data.sampling import EpochSampler
from sage_fast.errors import InputError
from sage_fast.models.classifiers import SmallResNet
from sage_fast.settings import check_at_least_one, check_not_negative, check_numbers, check_positive
from sage_fast.training.batches import deal, to_pixels
from sage_fast.training.ranks import Ranks, join_ranks
from sage_fast.training.runtime import Run
from sage_fast.training.updates import Guard, Update, load_optimizer

__all__ = ["ClassifierConfig", "OptimizerConfig", "seeded", "train_classifier", "train_network"]

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class OptimizerConfig:
    """Settings of :func:`train_network`: AdamW under a linear warm-up and a cosine down to zero.

    ``precision``: ``"float32"``, or ``"bfloat16"`` for the convolutions (twice as fast on a processor that has it).
    """

    total_steps: int = 5000
    batch: int = 64
    lr: float = 0.003
    weight_decay: float = 0.02  # of weights; norms and biases have none
    warmup: int = 200
    precision: str = "float32"
    seed: int = 0
    log_every: int = 50
    save_every: int = 500
    keep: int = 2  # checkpoints that stay
    tensorboard: bool = False  # event files beside the log: needs the extra "logs"

    def __post_init__(self) -> None:
        check_numbers(self)
        check_positive(self, "total_steps", "batch", "lr", "log_every", "save_every", "keep")
        check_not_negative(self, "weight_decay", "warmup")
        if self.batch < 2:
            raise InputError(f"batch must be at least 2 for batch normalisation, got {self.batch}.")
        if self.precision not in PRECISIONS:
            raise InputError(f"precision must be 'float32' or 'bfloat16', got {self.precision!r}.")


@dataclass(frozen=True)
class ClassifierConfig(OptimizerConfig):
    """Settings of :func:`train_classifier`.

    ``width``: see :class:`SmallResNet`; ``flip``: mirror each image with probability one half.
    """

    width: int = 48
    flip: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_one(self, "width")


def train_classifier(
    config: ClassifierConfig,
    images: Tensor,
    labels: Tensor,
    folder: str | Path,
    n_classes: int | None = None,
    resume: bool = False,
    device: str | torch.device = "cpu",
) -> SmallResNet:
    """Train a :class:`SmallResNet` with cross-entropy; returns it in eval mode.

    Args:
        images: uint8 [M, C, H, W].
        labels: int64 [M], 0 to ``n_classes - 1``.
        n_classes: default ``labels.max() + 1``.
        folder: run folder; the stage is ``classifier``.

    Raises:
        InputError: images and labels that do not fit, or a checkpoint that is not to be resumed.
    """
    n_classes = _check_data(images, labels, n_classes)
    ranks = join_ranks(device)
    share = ranks.share(config.batch)
    facts = {"data": data_fingerprint(images), "classes": n_classes}
    run = Run(folder, "classifier", config, resume, ranks, facts)
    network = seeded(config.seed, lambda: SmallResNet(n_classes, images.shape[1], config.width)).to(ranks.device)
    sampler = EpochSampler(len(images), config.batch, config.seed)

    def batch_loss(rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        index, flips = deal(sampler, share, config.flip, rng)
        x = to_pixels(images, index, flips, next(network.parameters()))
        truth = labels[index].to(ranks.device)
        logits = network(x)
        return F.cross_entropy(logits.float(), truth), {"top1": (logits.argmax(1) == truth).float().mean()}

    train_network(config, network, batch_loss, run, sampler)
    return network


def train_network(
    config: OptimizerConfig,
    network: nn.Module,
    batch_loss: Callable[[torch.Generator], tuple[Tensor, dict[str, Tensor]]],
    run: Run,
    sampler: EpochSampler | None = None,
) -> None:
    """Minimise ``batch_loss`` over the parameters of ``network``, which is left in eval mode.

    Args:
        batch_loss: draws a batch from the given random numbers and returns its loss and what else to log.
        run: where to log and to save; a checkpoint in it is continued bit for bit. Its ranks each draw their own batch, or
            their share of one, and average gradients; batches are normalised by the statistics of all ranks.
        sampler: what ``batch_loss`` draws from, for the checkpoint.
    Raises:
        InputError: a loss is not finite; no update was made with it, and ``logs/<stage>_diagnosis.json`` has what is known.
    """
    network.train()
    rng = torch.Generator().manual_seed(config.seed)
    optim = _optimizer(config, network)
    guard = Guard(run, {"network": network})
    update = Update("loss", optim, guard)
    first = 0
    if state := run.load():
        network.load_state_dict(state["network"])
        load_optimizer(optim, state["optim"])
        rng.set_state(state["rng"])
        if sampler is not None and "sampler" in state:  # runs of before drew with replacement
            sampler.load_state_dict(state["sampler"])
        first = state["step"]

    device = next(network.parameters()).device.type
    for step in run.track(first, config.total_steps):
        rate = config.lr * _schedule(step, config)
        for group in optim.param_groups:
            group["lr"] = rate
        guard.begin(step)
        with autocast(config.precision, device), _normalised_by_all(network, run.ranks):
            loss, scalars = batch_loss(rng)
        update.add(loss)
        loss = update.apply()

        done = step + 1
        if done % config.log_every == 0 or done == config.total_steps:
            guard.look()
            run.log(done, loss=loss, lr=rate, **scalars)
        if run.save_due(done, config.total_steps):
            guard.before_saving()
            state = {"network": network.state_dict(), "optim": optim.state_dict(), "rng": rng.get_state(), "step": done}
            run.save(state | ({"sampler": sampler.state_dict()} if sampler is not None else {}))
    network.eval()


@contextmanager
def _normalised_by_all(network: nn.Module, ranks: Ranks) -> Iterator[None]:
    """Inside, batch normalisations of a network that trains use mean and variance over all ranks (SyncBatchNorm, on CPUs too)."""
    layers = [layer for layer in network.modules() if isinstance(layer, nn.BatchNorm2d) and ranks.world > 1]
    for layer in layers:
        layer.forward = partial(_normalised, layer, ranks)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _normalised(layer: nn.BatchNorm2d, ranks: Ranks, x: Tensor) -> Tensor:
    assert layer.running_mean is not None and layer.running_var is not None and layer.momentum is not None
    wide = x.to(layer.running_mean.dtype)
    count = x.numel() // x.shape[1] * ranks.world
    mean = ranks.total(wide.sum((0, 2, 3))) / count
    centred = wide - mean.view(-1, 1, 1)
    variance = ranks.total(centred.square().sum((0, 2, 3))) / count
    with torch.no_grad():
        layer.running_mean.lerp_(mean, layer.momentum)
        layer.running_var.lerp_(variance * (count / (count - 1)), layer.momentum)
        if layer.num_batches_tracked is not None:
            layer.num_batches_tracked += 1
    scale = layer.weight * (variance + layer.eps).rsqrt()
    return (centred * scale.view(-1, 1, 1) + layer.bias.view(-1, 1, 1)).to(x.dtype)


def seeded(seed: int, build: Callable[[], Network]) -> Network:
    """The network that ``build`` makes from this seed; torch's own random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def _optimizer(config: OptimizerConfig, network: nn.Module) -> torch.optim.Optimizer:
    weights = [p for p in network.parameters() if p.ndim > 1]
    others = [p for p in network.parameters() if p.ndim <= 1]
    groups = [{"params": weights, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, fused=True)


def _schedule(step: int, config: OptimizerConfig) -> float:
    """Share of the learning rate at a step."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.total_steps - config.warmup)
    return 0.5 * (1 + math.cos(math.pi * done))


def _check_data(images: Tensor, labels: Tensor, n_classes: int | None) -> int:
    """The number of classes, once images and labels are found to fit."""
    if images.dtype != torch.uint8 or images.ndim != 4 or len(images) == 0:
        raise InputError(f"images must be uint8 [M, C, H, W], got {images.dtype} {list(images.shape)}.")
    if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
        raise InputError(f"labels must be int64 [{len(images)}], got {labels.dtype} {list(labels.shape)}.")
    needed = int(labels.max()) + 1
    if n_classes is None:
        n_classes = needed
    if labels.min() < 0 or n_classes < max(2, needed):
        raise InputError(
            f"labels must be 0 to n_classes - 1 with at least two classes, got {int(labels.min())} to {needed - 1} "
            f"and n_classes {n_classes}."
        )
    return n_classes
