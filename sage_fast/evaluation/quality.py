"""Quality of a generator against images that it was not trained on, as numbers of one feature network.

What a person watches while training: :class:`Quality` is made once from the held-out images and called with the generator
as often as wanted. A score's name ends in its network's name, ``fd_squeezenet1_1``; compare scores of one name, one
number of images and one set of held-out images only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from sage_fast.data.folders import ImageSet, read_images
from sage_fast.data.sources import open_source
from sage_fast.data.splits import hold_out
from sage_fast.errors import InputError
from sage_fast.evaluation.fid import feature_statistics, frechet_distance_of_statistics, kernel_distance
from sage_fast.evaluation.oracle import Oracle, load_oracle
from sage_fast.evaluation.precision_recall import Manifold
from sage_fast.evaluation.protocol import as_written
from sage_fast.models.inference import counter_noise
from sage_fast.models.perceptual import LPIPS, FeatureNetwork, load_perceptual
from sage_fast.models.stylegan2 import Discriminator, Generator
from sage_fast.models.weights import load_discriminator, load_generator
from sage_fast.ops.counter_normal import counter_normal
from sage_fast.training.watching import Watched

__all__ = ["Quality", "QualityConfig", "image_features", "load_features", "measure_folder", "watched"]

_LATENTS = 2**32 - 1  # the stream of the latents; noise maps take 0, 1, 2, ...


@dataclass(frozen=True)
class QualityConfig:
    """Settings of :class:`Quality`."""

    n_images: int = 2048  # generated a measurement; -n for short
    batch: int = 64  # images in the networks at a time; does not change the images
    seed: int = 0  # of the latents and of random noise
    #: of the synthesis; random maps depend on the seed and an image's number alone
    noise: Literal["random", "const", "none"] = "random"
    neighbours: int = 3  # k of precision and recall
    #: images of a random subset, the mean over which is the kernel distance of published tables; None: all pairs, which is
    #: the mean over every subset of any size
    subset_size: int | None = None
    n_subsets: int = 100  # how many, where subset_size is given

    def __post_init__(self) -> None:
        if self.batch < 1 or self.neighbours < 1 or self.n_images <= self.neighbours + 1:
            raise InputError(
                "batch and neighbours must be at least 1 and n_images greater than neighbours + 1, got "
                f"{self.batch}, {self.neighbours} and {self.n_images}."
            )
        if self.noise not in ("random", "const", "none"):
            raise InputError(f"noise must be 'random', 'const' or 'none', got {self.noise!r}.")
        if self.subset_size is not None and (not 2 <= self.subset_size <= self.n_images or self.n_subsets < 1):
            raise InputError(
                f"subset_size must be 2 to n_images {self.n_images} and n_subsets at least 1, got {self.subset_size} and "
                f"{self.n_subsets}."
            )


class Quality:
    """Measure generators against ``reals``: Frechet and kernel distance, precision and recall, of ``network``'s features.

    The same generator gives the same numbers at every call; no random state but its own is touched, and the features of
    the reals are made once.

    Args:
        config: see :class:`QualityConfig`.
        reals: held-out images, [M, C, R, R] uint8, or float in [-1, 1].
        network: a feature network of ``models.perceptual``, or flora's oracle.
        labels: int64 [M], classes of the reals, for a class-conditional generator: its classes come as often as
            theirs. Without them every class comes as often.

    Raises:
        InputError: too few reals, or images or labels that do not fit.
    """

    def __init__(
        self,
        config: QualityConfig,
        reals: Tensor,
        network: FeatureNetwork | Oracle,
        labels: Tensor | None = None,
    ) -> None:
        if reals.ndim != 4 or len(reals) <= config.neighbours + 1:
            raise InputError(
                f"reals must be more than {config.neighbours + 1} images [M, C, R, R], got {list(reals.shape)}; hold out more."
            )
        if labels is not None and (labels.shape != (len(reals),) or labels.dtype != torch.int64):
            raise InputError(f"labels must be int64 [{len(reals)}], got {labels.dtype} {list(labels.shape)}.")
        if config.subset_size is not None and config.subset_size > len(reals):
            raise InputError(f"subset_size must be at most the {len(reals)} held-out images, got {config.subset_size}.")
        self.config, self.network, self.labels = config, network, labels
        self.name = "oracle" if isinstance(network, Oracle) else network.name
        self._real = torch.cat([self._features(part) for part in reals.split(config.batch)])
        self._statistics, self._manifold = feature_statistics(self._real), Manifold(self._real, config.neighbours)

    def __call__(self, generator: Generator) -> dict[str, float]:
        """Scores of a generator; smaller is better for ``fd_`` and ``kd_``, greater for ``precision_`` and ``recall_``.

        The generator's mode and device stay as they are.

        Raises:
            InputError: the generator's images are not of the reals' kind, or not finite.
        """
        return self._scores(torch.cat([self._features(images) for images in self.generate(generator)]))

    def of_images(self, images: Tensor) -> dict[str, float]:
        """Scores of any images [N, C, R, R] in place of generated ones; training images give what can be hoped for.

        Where there are more than ``n_images``, that many at equal distances: as many as are generated, and of all categories
        of images that lie in their order.
        """
        n = min(self.config.n_images, len(images))
        parts = images[torch.arange(n) * len(images) // max(n, 1)].split(self.config.batch)
        return self._scores(torch.cat([self._features(part) for part in parts]))

    @torch.no_grad()
    def generate(self, generator: Generator) -> Iterator[Tensor]:
        """The images that are measured, [``batch``, C, R, R] at a time: each a function of the seed and its number."""
        config, like = self.config, generator.input.input
        for samples in torch.arange(config.n_images, device=like.device).split(config.batch):
            z = counter_normal(samples, config.seed, _LATENTS, generator.style.z_dim).to(like)
            w_plus = generator.broadcast(generator.mapping(z, self._classes(generator, samples)))
            if config.noise == "random":
                yield generator.synthesis(w_plus, counter_noise(generator, samples, config.seed))
            else:
                yield generator.synthesis(w_plus, config.noise)

    def _classes(self, generator: Generator, samples: Tensor) -> Tensor | None:
        """One-hot labels [N, c_dim] of the samples; None without classes."""
        if not generator.c_dim:
            return None
        if self.labels is None:
            classes = samples % generator.c_dim
        else:
            classes = self.labels.to(samples.device)[samples * len(self.labels) // self.config.n_images]
        return torch.nn.functional.one_hot(classes, generator.c_dim).to(generator.input.input)

    def _features(self, images: Tensor) -> Tensor:
        return image_features(self.network.to(images.device), as_written(images)).double().cpu()

    def _scores(self, features: Tensor) -> dict[str, float]:
        config = self.config
        generated = Manifold(features, config.neighbours)
        scores = {
            "fd": frechet_distance_of_statistics(*feature_statistics(features), *self._statistics),
            "kd": kernel_distance(features, self._real, config.subset_size, config.n_subsets),
            "precision": float(self._manifold.covers(features).double().mean()),
            "recall": float(generated.covers(self._real).double().mean()),
        }
        return {f"{score}_{self.name}": value for score, value in scores.items()}


def watched(
    images: ImageSet,
    features: str | Path,
    config: QualityConfig = QualityConfig(),
    share: float = 0.05,
    against: str | Path | None = None,
) -> Watched:
    """Images to train on, and the measure for a trainer: against images that it does not get.

    Args:
        features: see :func:`load_features`.
        share: of the images to hold out, at most 2,000.
        against: folder <category>/<image>.png, ... of other images of the same categories, in place of that share; where there
            is one category, its name does not matter, and the folder may be flat.

    Raises:
        InputError: a network, a share or a folder that cannot be used, other categories, or too few images.
    """
    network = load_features(features, setting="measure")
    if against is None:
        training, held_out = _hold_out(images, share)
    else:
        channels, size = images.images.shape[1:3]
        training, held_out = images, read_images(open_source(against, flat_ok=True), size, channels)
        of_one = len(held_out.categories) == len(images.categories) == 1
        if (odd := set(held_out.categories) ^ set(images.categories)) and not of_one:
            raise InputError(
                f"{str(against)!r} must have the categories of the training images; {min(odd)!r} is in one of them only."
            )
    if len(held_out) <= config.neighbours + 1:
        raise InputError(
            f"measuring needs more than {config.neighbours + 1} images that are not trained on, got {len(held_out)} of "
            f"{len(images)}; give a larger --held-out, or --measure-against a folder of more."
        )
    return Watched(training, Quality(config, held_out.images, network, held_out.labels), held_out)


def _hold_out(images: ImageSet, share: float) -> tuple[ImageSet, ImageSet]:
    """``hold_out``, whose refusal names the option."""
    try:
        return hold_out(images, share)
    except InputError as error:
        raise InputError(f"--held-out {share} cannot be used: {error}") from error


def measure_folder(
    model: str | Path | None,
    real: str | Path,
    features: str | Path,
    config: QualityConfig = QualityConfig(),
    device: str | torch.device = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """Scores of the generator of a bundle or file against the images of a folder, which it should not have been trained on.

    Args:
        model: bundle, or file of any published format; None: the model that comes with the package.
        real: <category>/<image>.png, ..., or one flat folder; the categories of a class-conditional model in their order.
        features: see :func:`load_features`; "discriminator" is the model's own.
        progress: called with (real images read, in all).

    Raises:
        InputError: a file that cannot be used, or another number of categories than the model's classes.
    """
    generator = load_generator(model, device)
    images = read_images(open_source(real, flat_ok=True), generator.resolution, generator.n_channels, progress=progress)
    if generator.c_dim and len(images.categories) != generator.c_dim:
        raise InputError(
            f"{str(real)!r} must have the {generator.c_dim} categories of the model, got {len(images.categories)}."
        )
    network = load_features(features, partial(load_discriminator, model))
    return Quality(config, images.images, network, images.labels if generator.c_dim else None)(generator)


def load_features(
    spec: str | Path, discriminator: Callable[[], Discriminator] | None = None, setting: str = "features"
) -> FeatureNetwork | Oracle:
    """The network named by ``spec``: "oracle" (flora's, of the package), or what ``models.perceptual.load_perceptual`` takes.

    Args:
        discriminator: gives that for "discriminator"; None: there is none to judge by.
        setting: what messages call ``spec``.
    Raises:
        InputError: as there, or another word, "none" among them: with it nothing can be measured.
    """
    words = ("oracle", *(() if discriminator is None else ("discriminator",)), *LPIPS)
    if str(spec) not in words and not Path(spec).is_file():
        raise InputError(f"{setting} must be {', '.join(words)} or a weights file that is there, got {str(spec)!r}.")
    if str(spec) == "oracle":
        return load_oracle()
    network = load_perceptual(spec, discriminator() if discriminator and str(spec) == "discriminator" else None)
    assert network is not None
    return network


@torch.no_grad()
def image_features(network: FeatureNetwork | Oracle, images: Tensor) -> Tensor:
    """Features [N, F] of images [N, C, R, R] in [-1, 1]: the last maps of a network, averaged over positions.

    Deviation: the FID takes Inception-v3's pool features; here the network is whichever is at hand, so the number bears
    its name and is not the FID.
    """
    if isinstance(network, Oracle):
        return network.features(images)
    return network(images)[-1].float().mean((2, 3))
