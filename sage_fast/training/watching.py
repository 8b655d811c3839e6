"""What is watched while a generator trains: its quality, and the signs of a run that goes wrong.

Training rests below evaluation, so a trainer is *given* its measure: a callable from a generator to named scores, the
first of which decides and is better when smaller, or None. ``evaluation.quality.Quality`` is one. The whole contract::

    watch = Watch(measure, config.measure_every_kimg, config.patience)
    ...
    if watch.due(kimg, last=done == total):
        run.log(done, **watch.score(average, kimg))    # watch.improved: the best so far, worth keeping
        if watch.stop:
            break                                      # after the checkpoint is saved
    run.save({..., "watch": watch.state_dict()})

A measure draws from no random state but its own and leaves the generator as it was, so watching changes no weight.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sage_fast.data.folders import ImageSet
from sage_fast.data.images import to_float
from sage_fast.errors import InputError, SageFastWarning
from sage_fast.models.stylegan2 import Generator
from sage_fast.settings import check_numbers

__all__ = ["CollapseConfig", "CollapseDetector", "Measure", "Watch", "Watched"]

Measure = Callable[[Generator], dict[str, float]]

_GO_BACK = (
    "resume from an earlier checkpoint where one was kept (docs/runtime.md), else begin anew, "
    "with a lower lr or a larger r1_gamma"
)
_SIDE = 8  # images are compared at this size: what a grid shows from afar


class Watched(NamedTuple):
    """What a generator is trained on, what scores it, and images of the same categories that it is not trained on."""

    images: ImageSet
    measure: Measure | None = None
    held_out: ImageSet | None = None


class Watch:
    """When to measure a generator, what came, the best so far, and whether it is time to stop.

    Args:
        measure: see the module; None: never due.
        every_kimg: thousands of real images between two measurements.
        patience: measurements without a new best after which ``stop`` is true; 0: never.

    Attributes:
        best: smallest main score so far (inf before the first), reached at ``best_kimg``.
        improved: whether the last score was it.
        scores: the last ones.

    Raises:
        InputError: a setting out of range.
    """

    def __init__(self, measure: Measure | None, every_kimg: float = 10.0, patience: int = 0) -> None:
        if not every_kimg > 0 or patience < 0:
            raise InputError(f"every_kimg must be positive and patience at least 0, got {every_kimg} and {patience}.")
        self.measure, self.every_kimg, self.patience = measure, every_kimg, patience
        self.best, self.best_kimg, self.measured_kimg, self.without = math.inf, 0.0, 0.0, 0
        self.improved, self.scores = False, dict[str, float]()

    def due(self, kimg: float, last: bool = False) -> bool:
        """Whether to measure after ``kimg``: at each multiple of ``every_kimg``, and after the ``last`` step."""
        if self.measure is None or kimg <= self.measured_kimg:
            return False
        return last or _multiples(kimg, self.every_kimg) > _multiples(self.measured_kimg, self.every_kimg)

    def score(self, generator: Generator, kimg: float) -> dict[str, float]:
        """Measure now: what ``measure`` gives.

        Raises:
            InputError: there is no measure, it gives no score, or another main score than before, with which none compares.
        """
        scores = self.measure(generator) if self.measure is not None else {}
        if not scores:
            raise InputError("the measure must give at least one score, got none; give a measure or do not ask.")
        name, main = next(iter(scores.items()))
        if self.scores and name != (before := next(iter(self.scores))):
            raise InputError(
                f"the run was measured by {before} so far, and {name} does not compare with it; give the measure of before, or "
                "another folder."
            )
        self.scores, self.measured_kimg, self.improved = scores, kimg, main < self.best
        self.without = 0 if self.improved else self.without + 1
        if self.improved:
            self.best, self.best_kimg = main, kimg
        return scores

    @property
    def stop(self) -> bool:
        """Whether the last ``patience`` measurements brought no new best."""
        return bool(self.patience) and self.without >= self.patience

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers for a checkpoint."""
        names = ("best", "best_kimg", "measured_kimg", "without", "improved", "scores")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        for name in self.state_dict():
            setattr(self, name, state[name])


@dataclass(frozen=True)
class CollapseConfig:
    """When :class:`CollapseDetector` speaks. docs/quality.md has the runs that the thresholds come from.

    ``start_kimg``: silent before, but for logits. ``half_life_kimg``: of the averages that the thresholds are for.
    ``sign``: the average of sign D(real), which StyleGAN2-ADA calls r_t. ``gap``: the same paper's r_v, the share of the
    discriminator's margin that training images have over held-out ones. ``logit``: mean size of logits, from the first step
    on. ``diversity``: of the grid, as a share of the reals'.
    """

    start_kimg: float = 20.0
    half_life_kimg: float = 5.0
    sign: float = 0.85
    gap: float = 0.3
    logit: float = 50.0
    diversity: float = 0.5

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.start_kimg < 0 or not self.half_life_kimg > 0:
            raise InputError(
                f"start_kimg must be at least 0 and half_life_kimg positive, got {self.start_kimg} and {self.half_life_kimg}."
            )


class CollapseDetector:
    """Warns, once each, of a discriminator that knows its training images by heart, of losses that run away, and of a
    generator that repeats itself.

    Args:
        reals: images of the data, uint8 [M, C, R, R], M at least 2 (some hundreds do): the diversity to compare with.
        config: see :class:`CollapseConfig`.
        augmented: whether the discriminator sees augmented images already, so that it is not suggested.

    Raises:
        InputError: other reals, or reals that are all alike.
    """

    def __init__(self, reals: Tensor, config: CollapseConfig = CollapseConfig(), augmented: bool = False) -> None:
        if reals.dtype != torch.uint8 or reals.ndim != 4 or len(reals) < 2:
            raise InputError(f"reals must be uint8 [M, C, R, R], M at least 2, got {reals.dtype} {list(reals.shape)}.")
        self.config, self.real_diversity = config, _diversity(to_float(reals[:1024]))
        if not self.real_diversity > 0:
            raise InputError("reals must differ, got images that are all alike.")
        self.augmented = augmented
        self.averages, self._seen = dict[str, float](), dict[str, float]()
        self._said: set[str] = set()

    def discriminator(
        self, kimg: float, real: Tensor, fake: Tensor | None = None, held_out: Tensor | None = None
    ) -> dict[str, float]:
        """Take note of logits [N, 1] of training images and, where there are any, of generated and of held-out ones.

        Implements the overfitting heuristics of Eq. 1 of Karras et al. 2020 [StyleGAN2-ADA].

        Returns:
            The averages for the log: ``real_sign_mean`` and, with held-out images, ``held_out_gap``.

        Raises:
            InputError: held-out logits without generated ones, whose distance they are measured by.
        """
        if held_out is not None and fake is None:
            raise InputError("held_out needs the logits of generated images too, got none; pass fake.")
        ours, fakes = _mean(real), _mean(real if fake is None else fake)
        values = {"real_sign_mean": _mean(real.sign())}
        if held_out is not None and ours > fakes:  # a discriminator that is still wrong has learnt nothing by heart
            values["held_out_gap"] = max(-1.0, min(1.0, (ours - _mean(held_out)) / (ours - fakes)))
        averages = {name: self._average(name, kimg, value) for name, value in values.items()}
        if (largest := max(abs(ours), abs(fakes))) > self.config.logit:
            self._warn(
                "divergence", kimg,
                f"the discriminator's logits are {largest:.3g} in the mean: the losses run away; {_GO_BACK}.",
            )  # fmt: skip
        elif kimg >= self.config.start_kimg:
            self._judge_overfitting(kimg, averages["real_sign_mean"], averages.get("held_out_gap"))
        return averages

    def _judge_overfitting(self, kimg: float, sign: float, gap: float | None) -> None:
        if sign > self.config.sign or (gap is not None and gap > self.config.gap):
            told = f"r_t {sign:.2f}" + ("" if gap is None else f", {gap:.0%} of its margin")
            self._warn(
                "overfitting", kimg,
                f"the discriminator tells the training images from others ({told}) and has less and less to teach; "
                f"resume with a larger r1_gamma, or begin anew with more images{'' if self.augmented else ' or augmentation (ADA)'}.",
            )  # fmt: skip

    def grid(self, kimg: float, images: Tensor) -> dict[str, float]:
        """Take note of generated images of fixed latents, float [N, C, R, R] in [-1, 1].

        Returns:
            ``diversity``: their mean distance from each other at 8 x 8 pixels, as a share of the reals'.
        """
        share = _diversity(images) / self.real_diversity
        if kimg >= self.config.start_kimg and share < self.config.diversity:
            self._warn(
                "collapse", kimg,
                f"the generated images differ by {share:.0%} of what real ones do: the generator repeats itself; "
                f"{_GO_BACK}, and see that the data holds no copies.",
            )  # fmt: skip
        return {"diversity": share}

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers for a checkpoint."""
        return {"averages": dict(self.averages), "seen": dict(self._seen), "said": sorted(self._said)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken: what was said is not said again."""
        self.averages, self._seen, self._said = dict(state["averages"]), dict(state["seen"]), set(state["said"])

    def _average(self, name: str, kimg: float, value: float) -> float:
        """The moving average of ``name``; its half-life is counted in images, so that it does not depend on the logging."""
        before, since = self.averages.get(name, value), kimg - self._seen.get(name, kimg)
        kept = 0.5 ** (max(0.0, since) / self.config.half_life_kimg)
        self.averages[name], self._seen[name] = kept * before + (1 - kept) * value, kimg
        return self.averages[name]

    def _warn(self, kind: str, kimg: float, message: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            warnings.warn(f"after {kimg:.0f} kimg {message}", SageFastWarning, stacklevel=2)


def _diversity(images: Tensor) -> float:
    """Mean Euclidean distance between two of float images in [-1, 1], averaged down to 8 x 8 pixels."""
    x = images.detach().float().clamp(-1, 1)
    x = F.adaptive_avg_pool2d(x, min(_SIDE, *x.shape[2:])).flatten(1)
    return float(torch.pdist(x).mean())


def _mean(x: Tensor) -> float:
    return float(x.detach().float().mean())


def _multiples(kimg: float, every: float) -> int:
    """How many multiples of ``every`` lie in (0, ``kimg``], but for rounding."""
    return math.floor(kimg / every + 1e-6)
