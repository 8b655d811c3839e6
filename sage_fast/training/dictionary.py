"""Learn the dictionary A of category-irrelevant directions from cached codes ([SAGE], Eq. 8-14).

The encoder is frozen in the method, so its codes are a table: it never runs here, and the residual of Eq. 7 is a
lookup. Only the MLP of Eq. 9 and A learn; the frozen generator runs for the image term of Eq. 11 alone
(``rec_weight=0`` leaves it out).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sage_fast.arithmetic import PRECISIONS, autocast
from sage_fast.data.folders import ImageSet
from sage_fast.data.resuming import data_fingerprint
from sage_fast.data.sampling import EpochSampler
from sage_fast.errors import InputError, counted
from sage_fast.factorization.category_irrelevant import (
    READINGS,
    CategoryIrrelevantDictionary,
    CodeMLP,
    layer_groups,
    orthogonal_loss,
    pca_directions,
    sparse_loss,
)
from sage_fast.factorization.class_embeddings import class_embeddings, residuals
from sage_fast.models.perceptual import FeatureNetwork, perceptual_distance
from sage_fast.models.stylegan2 import Generator
from sage_fast.settings import check_at_least_one, check_ignored, check_not_negative, check_numbers, check_positive
from sage_fast.training.batches import to_pixels
from sage_fast.training.feature_cache import cached_features
from sage_fast.training.losses import pixel_mse
from sage_fast.training.ranks import join_ranks
from sage_fast.training.runtime import Run
from sage_fast.training.updates import Guard, Update, load_optimizer

__all__ = ["DictionaryConfig", "check_width", "train_dictionary"]


@dataclass(frozen=True)
class DictionaryConfig:
    """Settings of :func:`train_dictionary`; :meth:`preset` gives the three readings of METHOD.

    All presets leave ``n_directions`` at None: with K near D the directions are nearly dependent, and codes of which some are
    masked (Eq. 19) explode.
    """

    n_directions: int | None = None  # K, at most D; None: the published 100, or a quarter of D when that is less
    reading: str = "default"  # forms of Eq. 9, 10, 12 and 13, and the layers edited: paper, released or default
    total_steps: int = 15_000  # length of the training
    batch: int = 32  # images a step
    lr: float = 0.0001  # Adam, constant
    lambda1: float = 0.0005  # of the orthogonality, Eq. 14
    lambda2: float = 0.005  # of the sparsity
    theta0: float = 0.5  # slope of the sigmoid of Eq. 10
    theta1: float = -1.0  # its offset
    rec_weight: float = 1.0  # of the image term, Eq. 11: MSE + perceptual distance; 0: no image is generated
    perceptual_weight: float = 1.0  # of the perceptual distance in the image term, by the encoder's network
    feature_cache_gb: float = 2.0  # memory for the features of all images, computed once; more than fit: at every step
    latent_weight: float = 1.0  # MSE(A n, delta_w), as SAGE-Diffusion adds it; not in [SAGE]
    init: str = "pca"  # directions begin as principal components of the residuals ("pca") or random ("normal")
    precision: str = "float32"  # of the image term: float32, or bfloat16 where the device multiplies it
    noise: str = "none"  # of the generator in the image term, none or const: the encoder's setting
    seed: int = 0  # of everything drawn
    log_every: int = 50  # steps from one line of the log to the next
    save_every: int = 1000  # steps from one checkpoint to the next
    grid_every: int = 1000  # steps from one grid of images to the next
    keep: int = 2  # checkpoints that stay
    tensorboard: bool = False  # event files beside the log: needs the extra "logs"

    def __post_init__(self) -> None:
        check_numbers(self)
        check_at_least_one(self, "n_directions")
        check_positive(self, "total_steps", "batch", "lr", "log_every", "save_every", "grid_every", "keep")
        check_not_negative(
            self, "lambda1", "lambda2", "rec_weight", "perceptual_weight", "latent_weight", "feature_cache_gb"
        )
        if self.precision not in PRECISIONS:
            raise InputError(f"precision must be {' or '.join(PRECISIONS)}, got '{self.precision}'.")
        if self.reading not in READINGS:
            raise InputError(f"reading must be one of {', '.join(READINGS)}, got '{self.reading}'.")
        if self.init not in ("pca", "normal"):
            raise InputError(f"init must be 'pca' or 'normal', got '{self.init}'.")
        if self.noise not in ("none", "const"):
            raise InputError(f"noise must be 'none' or 'const', the encoder's setting, got '{self.noise}'.")
        if self.rec_weight == 0 and self.latent_weight == 0:
            raise InputError("rec_weight and latent_weight are both 0; the dictionary needs one of them to learn from.")
        if self.rec_weight == 0:
            check_ignored(self, ("precision", *self._perceptual()), "rec_weight")

    def check_network(self, perceptual: str) -> None:
        """Raise InputError for settings of the perceptual distance where ``perceptual``, the encoder's network, is "none"."""
        if perceptual == "none":
            check_ignored(self, self._perceptual(), "a network in the encoder's perceptual")

    def _perceptual(self) -> tuple[str, ...]:
        """The settings of the perceptual distance; none where it is off."""
        return ("perceptual_weight", "feature_cache_gb") if self.perceptual_weight else ()

    @classmethod
    def preset(cls, name: str, **changes: Any) -> DictionaryConfig:
        """The settings of one reading: ``"paper"``, ``"released"`` or ``"default"``, with ``changes`` applied.

        Deviation: Adam in all three (the released code uses Ranger, the paper says Adam); K is the published 100 only where
        that is at most a quarter of D; images are not mirrored, since the codes of mirrored images are not in the table;
        ``released`` trains with the noise setting of the encoder, not with random noise, so that the target stays reachable.
        """
        if name not in READINGS:
            raise InputError(f"preset must be one of {', '.join(READINGS)}, got '{name}'.")
        base = cls(reading=name)
        if name == "paper":
            base = replace(base, perceptual_weight=0.0, latent_weight=0.0, init="normal")
        if name == "released":
            base = replace(base, latent_weight=0.0, init="normal")
        if name == "default":
            base = replace(base, lr=0.001, total_steps=5000)
        return replace(base, **changes)


def train_dictionary(
    config: DictionaryConfig,
    w_plus: Tensor,
    labels: Tensor,
    images: Tensor | ImageSet | None,
    generator: Generator | None,
    perceptual: FeatureNetwork | None,
    folder: str | Path,
    resume: bool = False,
    device: str | torch.device = "cpu",
) -> CategoryIrrelevantDictionary:
    """Learn A [L, D, K] from offsets ``w_plus`` [N, L, D] with ``labels`` [N] in 0 to S - 1.

    Implements Eq. 14 of [SAGE]. Layers outside the groups of the reading keep the image's own code, and their
    directions stay as initialised at zero. Ranks that torchrun started share every batch.

    Args:
        images: uint8 [N, C, R, R], those of ``w_plus``; may be None with ``rec_weight=0``, as may ``generator``.
        perceptual: feature network of Eq. 11, or None; frozen, as the generator is.
    Raises:
        InputError: tensors that do not belong together, a missing network, or a loss that is not finite; then no update was
            made with it, and ``logs/dictionary_diagnosis.json`` has what is known.
    """
    facts = {"codes": list(w_plus.shape), "data": {} if images is None else data_fingerprint(images)}
    pixels = images.images if isinstance(images, ImageSet) else images
    _check(config, w_plus, labels, pixels, generator)
    ranks = join_ranks(device)
    share, device = ranks.share(config.batch), ranks.device
    run = Run(folder, "dictionary", config, resume, ranks, facts)
    rng = torch.Generator().manual_seed(config.seed)
    sampler = EpochSampler(len(w_plus), config.batch, config.seed)
    embeddings = class_embeddings(w_plus, labels).to(device)
    delta_w = residuals(w_plus, labels, embeddings.cpu()).to(device)
    groups = [list(group) for group in layer_groups(w_plus.shape[1], config.reading)]
    edited = torch.zeros(w_plus.shape[1], 1, dtype=torch.bool, device=device)
    edited[[layer for group in groups for layer in group]] = True

    A = torch.nn.Parameter(_first_directions(config, delta_w, groups, rng))
    mlp = _new_mlp(config, groups, w_plus).to(device)
    optim = torch.optim.Adam([A, *mlp.parameters()], lr=config.lr, betas=(0.9, 0.999), fused=True)
    guard = Guard(run, {"mlp": mlp, "dictionary": torch.nn.ParameterDict({"directions": A})})
    update = Update("loss", optim, guard)
    rebuild = config.rec_weight > 0
    G = copy.deepcopy(generator).to(device).eval().requires_grad_(False) if rebuild and generator is not None else None
    perceptual = perceptual.to(device) if perceptual is not None and rebuild and config.perceptual_weight else None

    first = 0
    if state := run.load():
        mlp.load_state_dict(state["mlp"])
        load_optimizer(optim, state["optim"])
        with torch.no_grad():
            A.copy_(state["directions"])
        if "sampler" in state:  # runs of before drew with replacement
            sampler.load_state_dict(state["sampler"])
        first = state["step"]

    features = None
    if perceptual is not None and pixels is not None and first < config.total_steps:
        with autocast(config.precision, device):
            features = cached_features(perceptual, pixels, delta_w, config.feature_cache_gb)

    for step in run.track(first, config.total_steps):
        batch = sampler.next()
        guard.begin(step, batch)
        index = batch[share]
        target = delta_w[index.to(device)]  # [N, L, D], Eq. 7
        codes = mlp(target)  # [N, L, K], Eq. 9
        edits = torch.where(edited, torch.einsum("ldk,nlk->nld", A, codes), target)

        terms = {
            "orth": orthogonal_loss(A, embeddings, config.reading),  # Eq. 12, 13
            "sparse": sparse_loss(codes, config.theta0, config.theta1, config.reading),  # Eq. 10
            "latent": (edits - target).square().mean(),
        }
        if G is not None and pixels is not None:  # Eq. 11
            e = embeddings[labels[index].to(device)]
            real = to_pixels(pixels, index, None, delta_w)
            with autocast(config.precision, device):
                rebuilt = G(e + edits + G.latent_avg, noise=config.noise)
                terms["rec"] = pixel_mse(rebuilt, real)
                if perceptual is not None:
                    targets = real if features is None else [m[index] for m in features]
                    distance = perceptual_distance(perceptual, rebuilt, targets)
                    terms[f"perceptual_{perceptual.name}"] = distance
        loss = torch.stack([_weight(config, name) * term for name, term in terms.items()]).sum()  # Eq. 14

        update.add(loss)
        loss = update.apply()

        done = step + 1
        if done % config.log_every == 0 or done == config.total_steps:
            guard.look()
            run.log(done, loss=loss, **terms)
        if G is not None and (done % config.grid_every == 0 or done == config.total_steps):
            run.grid(f"rebuilt_{done:06d}", torch.stack([real, rebuilt], 1).flatten(0, 1)[:64])
        if run.save_due(done, config.total_steps):
            guard.before_saving()
            state = {"mlp": mlp.state_dict(), "directions": A.detach(), "optim": optim.state_dict()}
            run.save({**state, "sampler": sampler.state_dict(), "step": done})
    return CategoryIrrelevantDictionary(A.detach().cpu(), groups)


def _weight(config: DictionaryConfig, term: str) -> float:
    """Weight of a term of Eq. 14."""
    if term.startswith("perceptual"):
        return config.rec_weight * config.perceptual_weight
    names = {"orth": "lambda1", "sparse": "lambda2", "latent": "latent_weight", "rec": "rec_weight"}
    return getattr(config, names[term])


def check_width(config: DictionaryConfig, dim: int) -> None:
    """Raise InputError for more directions than the codes have dimensions."""
    if config.n_directions is not None and config.n_directions > dim:
        raise InputError(
            f"n_directions must be at most the width of the codes, {dim}, got {config.n_directions}; leave it out for a quarter of "
            "the width."
        )


def _n_directions(config: DictionaryConfig, dim: int) -> int:
    """K: as given, else 100 or a quarter of D."""
    return min(100, max(1, dim // 4)) if config.n_directions is None else config.n_directions


def _first_directions(
    config: DictionaryConfig, delta_w: Tensor, groups: list[list[int]], rng: torch.Generator
) -> Tensor:
    """A [L, D, K] at the start; zero at layers outside the groups.

    ``"normal"``: independent N(0, 1), as released. ``"pca"``: principal directions of each group's layers taken
    together, since these share one code, plus small noise; directions beyond the rank of the residuals are that noise
    alone.
    """
    _, n_latent, dim = delta_w.shape
    A = torch.zeros(n_latent, dim, _n_directions(config, dim))
    for group in groups:
        noise = torch.randn(len(group), dim, _n_directions(config, dim), generator=rng)
        if config.init == "normal":
            A[group] = noise
            continue
        flat = delta_w[:, group].reshape(len(delta_w), 1, -1)  # [N, 1, G D]
        kept = min(_n_directions(config, dim), len(delta_w), flat.shape[2])
        joint = pca_directions(flat, kept).view(len(group), dim, kept) * len(group) ** 0.5
        A[group] = noise * (0.01 / dim**0.5)
        A[group, :, :kept] += joint.cpu().to(A)  # zero beyond the rank
    return A.to(delta_w.device)


def _new_mlp(config: DictionaryConfig, groups: list[list[int]], w_plus: Tensor) -> CodeMLP:
    """A fresh MLP of Eq. 9; leaves torch's own random state alone."""
    width = None if config.reading == "default" else 1024
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        _, n_latent, dim = w_plus.shape
        return CodeMLP(groups, n_latent, dim, _n_directions(config, dim), width, one_network=config.reading == "paper")


def _check(
    config: DictionaryConfig, w_plus: Tensor, labels: Tensor, images: Tensor | None, generator: Generator | None
) -> None:
    if w_plus.ndim != 3 or labels.shape != (len(w_plus),):
        raise InputError(
            f"w_plus and labels must have shapes [N, L, D] and [N], got {list(w_plus.shape)} and {list(labels.shape)}."
        )
    check_width(config, w_plus.shape[2])
    if len(labels.unique()) == len(labels):
        raise InputError(
            f"labels must give one category two codes at least, got {counted(len(labels), 'code')} of as many categories: directions "
            "are learned from how the codes of a category differ."
        )
    if config.rec_weight == 0:
        return
    if generator is None or images is None:
        raise InputError(
            "the image term (rec_weight > 0) needs the images and the generator; pass both or set rec_weight=0."
        )
    if w_plus.shape[1:] != (generator.n_latent, generator.style_dim):
        raise InputError(
            f"w_plus must have shape [N, {generator.n_latent}, {generator.style_dim}] for this generator, got "
            f"{list(w_plus.shape)}; embed the images with its encoder."
        )
    size = generator.resolution
    if images.dtype != torch.uint8 or tuple(images.shape) != (len(w_plus), generator.n_channels, size, size):
        raise InputError(
            f"images must be uint8 [{len(w_plus)}, {generator.n_channels}, {size}, {size}], one for each code, got "
            f"{images.dtype} {list(images.shape)}."
        )
