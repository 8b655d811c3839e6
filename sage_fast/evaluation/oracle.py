"""The oracle of flora: which category an image shows, and in which pose and light.

One network, trained on fresh renderings of all 240 categories, seen and unseen. On flora the truth is known, so the
oracle's own error is measured and stored with it, and what it says of generated images can be trusted to that degree.

Train it by one command::

    python -m sage_fast.evaluation.oracle --out DIR --resolution 32
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from safetensors import SafetensorError
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor, nn
from torch.nn import functional as F

from sage_fast.data.flora import FACTORS, N_SEEN, N_UNSEEN, categories, render
from sage_fast.data.flora_drawing import FACTOR_RANGES
from sage_fast.data.images import to_float
from sage_fast.data.writers import atomic_write, write_json
from sage_fast.errors import InputError
from sage_fast.models.classifiers import SmallResNet
from sage_fast.settings import check_at_least_one
from sage_fast.training.classifier import OptimizerConfig, seeded, train_network
from sage_fast.training.runtime import Run

__all__ = [
    "TARGETS",
    "Oracle",
    "OracleConfig",
    "factor_targets",
    "load_oracle",
    "measure_oracle",
    "save_oracle",
    "train_oracle",
]

_FORMAT = "sage_fast.oracle"
_SHIPPED = Path(__file__).resolve().parent.parent / "model" / "oracle.safetensors"
_N_CATEGORIES = N_SEEN + N_UNSEEN
_FIRST_TRAINED = 2**20  # renderings with a smaller index are never trained on
_FIRST_TESTED = 500_000
_PETALS = np.array([category.traits["petals"] for category in categories()], np.float32)

#: what the oracle tells of pose and light: name -> range of its values
TARGETS: dict[str, tuple[float, float]] = {
    "petal_phase_cos": (-1, 1),
    "petal_phase_sin": (-1, 1),
    "tilt_x": FACTOR_RANGES["tilt_x"],
    "tilt_y": FACTOR_RANGES["tilt_y"],
    "size": (0.74, 1.08),
    "x": FACTOR_RANGES["x"],
    "y": FACTOR_RANGES["y"],
    "light_cos": (-1, 1),
    "light_sin": (-1, 1),
    "brightness": FACTOR_RANGES["brightness"],
    "warmth": FACTOR_RANGES["warmth"],
    "background_hue_cos": (-1, 1),
    "background_hue_sin": (-1, 1),
    "background_light": FACTOR_RANGES["background_light"],
    "background_slope_cos": (-1, 1),
    "background_slope_sin": (-1, 1),
    "blur": FACTOR_RANGES["blur"],
}


@dataclass(frozen=True)
class OracleConfig(OptimizerConfig):
    """Settings of :func:`train_oracle`."""

    total_steps: int = 6000
    resolution: int = 32
    width: int = 48
    factor_weight: float = 1.0  # of the mean squared error of the standardised factors, beside the cross-entropy
    n_test: int = 25  # unseen renderings of each category to measure on

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resolution < 16 or self.resolution & (self.resolution - 1):
            raise InputError(f"resolution must be a power of two of at least 16, got {self.resolution}.")
        check_at_least_one(self, "width")
        if self.n_test < 2 or self.factor_weight < 0:
            raise InputError(
                f"n_test must be at least 2 and factor_weight not negative, got {self.n_test} and {self.factor_weight}."
            )


class Oracle(nn.Module):
    """Category and category-irrelevant factors of flora's images.

    A :class:`SmallResNet` over all 240 categories; a second head reads the factors from its last maps, averaged to
    4 x 4 (at 32 px they are that size).

    Args:
        resolution: R of the images.
        width: see :class:`SmallResNet`.
    """

    def __init__(self, resolution: int = 32, width: int = 48) -> None:
        super().__init__()
        self.resolution = resolution
        self.classifier = SmallResNet(_N_CATEGORIES, 3, width)
        n_maps, hidden = self.classifier.n_features, 2 * width
        self.regressor = nn.Sequential(nn.Linear(16 * n_maps, hidden), nn.ReLU(), nn.Linear(hidden, len(TARGETS)))

    def architecture(self) -> dict[str, int]:
        """The constructor's arguments."""
        return {"resolution": self.resolution, "width": self.classifier.width}

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images [N, 3, R, R] in [-1, 1] -> logits [N, 240], standardised factors [N, T], features [N, F]."""
        if images.ndim != 4 or images.shape[1:] != (3, self.resolution, self.resolution):
            raise InputError(
                f"images must have shape [N, 3, {self.resolution}, {self.resolution}] for this oracle, "
                f"got {list(images.shape)}; use an oracle of their resolution, or another network."
            )
        maps = self.classifier.maps(images)
        features = maps.mean(dim=(2, 3))
        return self.classifier.head(features), self.regressor(F.adaptive_avg_pool2d(maps, 4).flatten(1)), features

    def logits(self, images: Tensor) -> Tensor:
        """Images [N, 3, R, R] in [-1, 1] -> logits of the categories [N, 240]."""
        return self._in_batches(images, 0)

    def predict(self, images: Tensor) -> Tensor:
        """Images [N, 3, R, R] in [-1, 1] -> numbers of the categories, int64 [N]."""
        return self.logits(images).argmax(1)

    def features(self, images: Tensor) -> Tensor:
        """Images [N, 3, R, R] in [-1, 1] -> features [N, F], for distances between sets of images."""
        return self._in_batches(images, 2)

    def factors(self, images: Tensor) -> Tensor:
        """Images [N, 3, R, R] in [-1, 1] -> factors [N, T] in the order, units and ranges of ``TARGETS``."""
        mean, scale = _standard(images.device)
        return self._in_batches(images, 1) * scale + mean

    @torch.no_grad()
    def _in_batches(self, images: Tensor, which: int) -> Tensor:
        return torch.cat([self(part)[which] for part in images.split(256)]) if len(images) else self(images)[which]


def factor_targets(category_ids: Tensor, factors: Tensor) -> Tensor:
    """What an image shows of its factors: [N, T] in the order of ``TARGETS``.

    Circular factors are given as cosine and sine. Two things are replaced by what can be seen of them: rotation by the
    phase of the petals (their number times the angle), for a turn by the angle between two petals changes nothing but
    the leaves; scale and openness by their product ``size``, the reach of the petals, for only the leaves tell them
    apart.

    Args:
        category_ids: [N].
        factors: [N, F] as from ``flora.render``.
    """
    value = dict(zip(FACTORS, factors.unbind(1)))
    petals = torch.from_numpy(_PETALS)[category_ids]
    angles = {
        "petal_phase": petals * value["rotation"],
        "light": value["light"],
        "background_hue": 2 * math.pi * value["background_hue"],
        "background_slope": value["background_slope"],
    }
    value["size"] = value["scale"] * value["openness"]
    for name, angle in angles.items():
        value |= {f"{name}_cos": torch.cos(angle), f"{name}_sin": torch.sin(angle)}
    return torch.stack([value[name] for name in TARGETS], 1)


def train_oracle(config: OracleConfig, folder: str | Path, resume: bool = False) -> Oracle:
    """Train on fresh renderings, never the same twice; writes ``oracle.safetensors`` (float16) and ``oracle.json``.

    Returns:
        The oracle as it was stored, in eval mode; what it reaches on unseen renderings stands in ``oracle.json``.
    """
    folder = Path(folder)
    run = Run(folder, "oracle", config, resume)
    oracle = seeded(config.seed, lambda: Oracle(config.resolution, config.width))
    mean, scale = _standard("cpu")

    def batch_loss(rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        ids = torch.randint(_N_CATEGORIES, (config.batch,), generator=rng)
        indices = torch.randint(_FIRST_TRAINED, 2**32, (config.batch,), generator=rng)
        images, factors = render(ids, indices, config.resolution)
        logits, predicted, _ = oracle(to_float(images))
        entropy = F.cross_entropy(logits.float(), ids)
        error = F.mse_loss(predicted.float(), (factor_targets(ids, factors) - mean) / scale)
        top1 = (logits.argmax(1) == ids).float().mean()
        return entropy + config.factor_weight * error, {"entropy": entropy, "factor_error": error, "top1": top1}

    train_network(config, oracle, batch_loss, run)
    rounded = {name: value.half().float() for name, value in oracle.state_dict().items() if value.is_floating_point()}
    oracle.load_state_dict(rounded, strict=False)
    save_oracle(folder / "oracle.safetensors", oracle, config, measure_oracle(oracle, config.n_test))
    return load_oracle(folder)


def measure_oracle(oracle: Oracle, n_test: int = 25) -> dict[str, Any]:
    """What the oracle reaches on ``n_test`` renderings of each category that it was not trained on.

    Returns:
        ``top1`` over all, ``top1_seen``, ``top1_unseen``, ``top1_worst`` (of the categories), ``n_images``, and ``r2``:
        target -> share of its variance that the oracle tells.
    """
    ids = torch.arange(_N_CATEGORIES).repeat_interleave(n_test)
    indices = _FIRST_TESTED + torch.arange(n_test).repeat(_N_CATEGORIES)
    right, predicted, truth = [], [], []
    for some_ids, some_indices in zip(ids.split(1200), indices.split(1200)):
        images, factors = render(some_ids, some_indices, oracle.resolution)
        right.append(oracle.predict(to_float(images)) == some_ids)
        predicted.append(oracle.factors(to_float(images)))
        truth.append(factor_targets(some_ids, factors))
    correct = torch.cat(right).float().view(_N_CATEGORIES, n_test).mean(1)
    targets = torch.cat(truth)
    r2 = 1 - (torch.cat(predicted) - targets).square().mean(0) / targets.var(0, correction=0)
    return {
        "n_images": len(ids),
        "top1": round(correct.mean().item(), 5),
        "top1_seen": round(correct[:N_SEEN].mean().item(), 5),
        "top1_unseen": round(correct[N_SEEN:].mean().item(), 5),
        "top1_worst": round(correct.min().item(), 5),
        "r2": {name: round(value, 4) for name, value in zip(TARGETS, r2.tolist())},
    }


def save_oracle(path: str | Path, oracle: Oracle, config: OracleConfig, scores: dict[str, Any]) -> None:
    """Write the weights as float16 safetensors, and beside them a JSON file of the same stem that describes them."""
    path = Path(path)
    stored = {name: value.half() for name, value in oracle.state_dict().items() if value.is_floating_point()}
    content = to_bytes({name: value.contiguous() for name, value in stored.items()})
    about = {
        "format": _FORMAT,
        "version": 1,
        "architecture": oracle.architecture(),
        "targets": list(TARGETS),
        "sha256": hashlib.sha256(content).hexdigest(),
        "scores": scores,
        "training": dataclasses.asdict(config),
    }
    with atomic_write(path) as file:
        file.write(content)
    write_json(path.with_suffix(".json"), about)


def load_oracle(path: str | Path | None = None, device: str | torch.device = "cpu") -> Oracle:
    """Read what :func:`train_oracle` wrote, in eval mode.

    Args:
        path: the file ``oracle.safetensors`` or the folder that holds it; default the one shipped with the package.

    Raises:
        InputError: a file is missing, truncated, changed, or no oracle of this version.
    """
    path = _SHIPPED if path is None else Path(path)
    path = path / "oracle.safetensors" if path.is_dir() else path
    about = _read_about(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise _damaged(path, error.strerror or "unreadable") from error
    if hashlib.sha256(content).hexdigest() != about["sha256"]:
        raise _damaged(path, "its SHA-256 is not the one in its JSON file")
    try:
        oracle = Oracle(**about["architecture"])
        weights = {name: value.float() for name, value in from_bytes(content).items()}
        counters = {name: value for name, value in oracle.state_dict().items() if not value.is_floating_point()}
        oracle.load_state_dict(weights | counters)
    except (SafetensorError, RuntimeError, TypeError) as error:
        raise _damaged(path, "the weights do not fit the architecture") from error
    return oracle.to(device).eval().requires_grad_(False)


def _read_about(path: Path) -> dict[str, Any]:
    about_path = path.with_suffix(".json")
    try:
        about = json.loads(about_path.read_text())
    except (OSError, ValueError) as error:
        raise _damaged(about_path, "it is missing or no JSON") from error
    if not isinstance(about, dict) or about.get("format") != _FORMAT or about.get("version") != 1:
        raise _damaged(about_path, "it describes no oracle of this version")
    if about.get("targets") != list(TARGETS) or not {"sha256", "architecture"} <= set(about):
        raise _damaged(about_path, "it describes an oracle with other targets")
    return about


def _damaged(path: Path, reason: str) -> InputError:
    remedy = "train it again with 'python -m sage_fast.evaluation.oracle'"
    return InputError(f"Oracle file {str(path)!r} cannot be used ({reason}); {remedy}.")


def _standard(device: str | torch.device) -> tuple[Tensor, Tensor]:
    """Mean and scale [T] that standardise the targets: a uniform number's, and 1 / sqrt(2) for cosine and sine."""
    low, high = torch.tensor(list(TARGETS.values()), device=device).T
    circular = torch.tensor([name.endswith(("_cos", "_sin")) for name in TARGETS], device=device)
    return (low + high) / 2, (high - low) / torch.where(circular, 8.0, 12.0).sqrt()


def _command(out: Path, config: OracleConfig, resume: bool = False, threads: int = 0) -> None:
    """Train the oracle of flora and write it into a folder.

    Args:
        out: the folder; oracle.safetensors and oracle.json appear in it.
        resume: go on from the checkpoint in it.
        threads: of the processor; 0 for as many as torch takes.
    """
    if threads:
        torch.set_num_threads(threads)
    train_oracle(config, out, resume)
    print(json.dumps(json.loads((out / "oracle.json").read_text())["scores"], indent=2))


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    try:
        tyro.cli(_command, args=argv, prog="python -m sage_fast.evaluation.oracle", config=(tyro.conf.OmitArgPrefixes,))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
