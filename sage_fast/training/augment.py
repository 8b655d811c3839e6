"""Augmentation of what a discriminator sees, for training on little data: settings, the adaptive strength, and the calls.

[ADA] is Karras et al. 2020, "Training generative adversarial networks with limited data". [DiffAugment] is Zhao et al. 2020,
"Differentiable augmentation for data-efficient GAN training".

    augment = Augment(AugmentConfig("ada"))
    draws = augment.draw(len(batch), rng)              # for the global batch, on every rank
    logits = D(augment.apply(images, draws[share]))    # share: which images of the global batch these are
    augment.observe(real_logits)                       # once a step, the logits of all real images
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sage_fast.errors import InputError
from sage_fast.settings import check_numbers
from sage_fast.training.ada import PIPELINES, apply_ada, draw_ada
from sage_fast.training.diff_augment import POLICIES, apply_diff_augment, draw_diff_augment
from sage_fast.training.draws import Draws

__all__ = ["Augment", "AugmentConfig", "Draws"]

KINDS = ("none", "ada", "diffaugment")
#: the settings that each kind reads, besides ``kind``
_READS = {"none": (), "ada": ("transforms", "p"), "diffaugment": ("policy",)}
_ADAPTIVE = ("target", "interval", "speed_kimg")


@dataclass(frozen=True)
class AugmentConfig:
    """Settings of :class:`Augment`; a setting that the kind does not read must keep its default."""

    kind: str = "none"  # none, ada (adaptive) or diffaugment
    transforms: str = "bgc"  # ada: blitting, geometric, colour, filtering, noise, cutout: "b", "bg", ... or "bgcfnc"
    p: float | None = None  # ada: probability of each transform, 0 to 1; None: adaptive, from 0
    target: float = 0.6  # adaptive: the mean sign of the real logits to hold
    interval: int = 4  # adaptive: steps between two changes of p
    speed_kimg: float = 500.0  # adaptive: thousands of real images in which p can go from 0 to 1
    policy: str = "color,translation,cutout"  # diffaugment: which, in this order

    def __post_init__(self) -> None:
        check_numbers(self)
        for name, allowed in (("kind", KINDS), ("transforms", tuple(PIPELINES))):
            if getattr(self, name) not in allowed:
                raise InputError(
                    f"{name} of augmentation must be {', '.join(allowed[:-1])} or {allowed[-1]}, got '{getattr(self, name)}'."
                )
        words = self.policy.split(",")
        if not set(words) <= set(POLICIES) or len(set(words)) < len(words):
            raise InputError(f"policy must be some of {','.join(POLICIES)}, each once, got '{self.policy}'.")
        if self.p is not None and not 0 <= self.p <= 1:
            raise InputError(f"p is a probability, expected 0 to 1 or None for an adaptive one, got {self.p}.")
        if not -1 <= self.target <= 1:
            raise InputError(f"target is a mean of signs, expected -1 to 1, got {self.target}.")
        if type(self.interval) is not int or self.interval < 1:
            raise InputError(f"interval must be a whole number of steps, at least 1, got {self.interval}.")
        if not self.speed_kimg > 0:
            raise InputError(f"speed_kimg must be positive, got {self.speed_kimg}.")
        self._check_ignored()

    def _check_ignored(self) -> None:
        read = ("kind", *_READS[self.kind], *(_ADAPTIVE if self.adaptive else ()))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in read and value != field.default:
                fixed = " with a fixed p" if self.kind == "ada" and field.name in _ADAPTIVE else ""
                raise InputError(
                    f"{field.name} = {value!r} would be ignored by augmentation '{self.kind}'{fixed}; leave it out."
                )

    @property
    def adaptive(self) -> bool:
        """Whether p follows the discriminator."""
        return self.kind == "ada" and self.p is None


class Augment:
    """Random transforms of images before a discriminator, with a strength that may follow how much it overfits.

    Implements the stochastic discriminator augmentation and its adaptive control of [ADA], sections 2 and 3, or [DiffAugment].

    Attributes:
        p: the probability of each transform now, 0 to 1; 1 for DiffAugment, which has none.
    """

    def __init__(self, config: AugmentConfig) -> None:
        self.config = config
        self.p = {"none": 0.0, "diffaugment": 1.0}.get(config.kind, config.p or 0.0)
        self._signs: float | Tensor = 0.0  # sum over the logits since p last changed
        self._logits = self._steps = 0  # how many, in how many steps

    def draw(self, n: int, rng: torch.Generator) -> Draws:
        """Draw the transforms of a global batch of n images; ``rng`` is on the CPU and in the same state on every rank."""
        if rng.device.type != "cpu":
            raise InputError(f"rng must be a torch.Generator on the CPU, got one on {rng.device}.")
        if self.config.kind == "ada":
            return draw_ada(n, self.p, self.config.transforms, rng)
        if self.config.kind == "diffaugment":
            return draw_diff_augment(n, rng)
        return Draws.of(torch.empty(n, 0))

    def apply(self, images: Tensor, draws: Draws) -> Tensor:
        """Transform images by their draws, differentiably (any number of times) in the images.

        Args:
            images: [N, C, H, W] in [-1, 1] nominal, C from 1 to 4 (2 and 4: the last is alpha), any floating dtype; half
                precision is computed in float32, also under autocast.
            draws: of these N images, as ``draw(...)[index]`` gives them.
        Returns:
            [N, C, H, W] in the dtype and memory format of images.
        Raises:
            InputError: images of another form, or draws of another number of images.
        """
        draws.check(images)
        if self.config.kind == "none" or not len(images):
            return images
        x = images.contiguous()
        with torch.autocast(images.device.type, enabled=False):
            x = x if x.dtype in (torch.float32, torch.float64) else x.float()
            if self.config.kind == "ada":
                x = apply_ada(x, draws)
            else:
                x = apply_diff_augment(x, draws, self.config.policy.split(","))
        last = not images.is_contiguous() and images.is_contiguous(memory_format=torch.channels_last)
        return x.to(images.dtype, memory_format=torch.channels_last if last else torch.preserve_format)

    def observe(self, real_logits: Tensor) -> None:
        """Take the logits of a step's real images, of all ranks; every ``interval`` steps p moves towards the target.

        Implements r_t = E[sign(D(real))] of [ADA], Eq. 1, and its control in section 3: p rises when r_t is above the target and
        falls when below, by (images since the last change) / (1000 speed_kimg), within 0 to 1. A fixed p stays.
        """
        if not self.config.adaptive:
            return
        self._signs = self._signs + real_logits.detach().sign().sum(dtype=torch.float32)
        self._logits += real_logits.numel()
        self._steps += 1
        if self._steps >= self.config.interval:
            r = float(self._signs) / max(self._logits, 1)  # the only wait for the device
            step = self._logits / (self.config.speed_kimg * 1000)
            self.p = min(max(self.p + step * ((r > self.config.target) - (r < self.config.target)), 0.0), 1.0)
            self._signs, self._logits, self._steps = 0.0, 0, 0

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers from which :meth:`load_state_dict` continues bit for bit."""
        return {"p": self.p, "signs": float(self._signs), "logits": self._logits, "steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a :meth:`state_dict`.

        Raises:
            InputError: the state is none, or its p is not the fixed one of the config.
        """
        expected = set(self.state_dict())
        if set(state) != expected:
            raise InputError(f"state of augmentation must have {sorted(expected)}, got {sorted(state)}.")
        if not self.config.adaptive and state["p"] != self.p:
            raise InputError(f"state of augmentation has p = {state['p']}, but the settings fix it at {self.p}.")
        self.p, self._signs = state["p"], state["signs"]
        self._logits, self._steps = state["logits"], state["steps"]
