"""From a few images of a novel category to new images of it: encoder, editor, generator and fusion in one call.

Latents are offsets from ``latent_avg`` on the latent side and absolute at the generator's door, and converted there.
The latent side runs on the CPU whatever the device of the networks, so that the device does not show in the latents.
"""

from __future__ import annotations

import copy
import hashlib
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sage_fast.arithmetic import DRAWING_PRECISIONS, autocast, computed, one_thread, substitution
from sage_fast.data.images import to_float
from sage_fast.data.latent_table import LatentTable
from sage_fast.editing.distribution import ClassDistribution
from sage_fast.editing.editor import METHODS as EDITOR_METHODS
from sage_fast.editing.editor import PRESETS, FewShotEditor, check_used, unused_settings
from sage_fast.editing.mapping import mapping_warning, usual_components
from sage_fast.errors import InputError, SageFastWarning
from sage_fast.factorization.category_irrelevant import CategoryIrrelevantDictionary
from sage_fast.factorization.category_relevant import CategoryRelevantDictionary
from sage_fast.fusion import fuse_both, fuse_frequencies, fuse_pixels
from sage_fast.models.checkpoints import path_of
from sage_fast.models.image_encoder import ImageEncoder, Inversion, WeightDeltas
from sage_fast.models.published import published_directions, read_published
from sage_fast.models.stylegan2 import Generator
from sage_fast.models.weight_deltas import join_deltas, select_deltas, synthesize
from sage_fast.models.weights import check_parts, load_bundle, load_directions
from sage_fast.ops.cuda_convolution import repeatable

__all__ = [
    "FUSIONS", "INVERSION_DEVICES", "METHODS", "FewShotPipeline", "NovelCategory", "Result", "load_dictionary", "normals",
]  # fmt: skip

METHODS = (*EDITOR_METHODS, "inversion")
"""The editor's methods, and the plain reconstruction of the shots."""

INVERSION_DEVICES = ("cpu", "model")
"""Where shots become latents: on the CPU, or beside the networks that draw."""

FUSIONS = ("none", "pixel", "frequency", "both")
"""What generated images are fused with their shot by; ``"both"`` is frequencies first, then pixels."""

_LARGEST = 4.0  # float images above it were not scaled to [-1, 1]
_N_COMPONENTS = max(settings["n_components"] for settings in PRESETS.values())
_PIXEL: dict[str, dict[str, Any]] = {
    "paper": {"blend": "printed"},
    "released": {"blend": "convex"},
    "default": {"blend": "residual"},
}
_FREQUENCY: dict[str, dict[str, Any]] = {"paper": {}, "released": {"gamma1": 0.8, "gamma2": 0.3}, "default": {}}


@dataclass(frozen=True, eq=False)
class NovelCategory:
    """What drawing needs to know of a novel category.

    Attributes:
        shots: the given images [K, C, R, R] in [-1, 1], on the CPU; none where nothing is fused.
        w_plus: their offsets from ``latent_avg`` [K, L, D].
        inverted: their reconstructions [K, C, R, R] in [-1, 1]; as the shots.
        distribution: of the category's latents; None for the method ``"inversion"``.
        weight_deltas: what HyperStyle changes in the generator for each shot, and for what is drawn from it; else None.
    """

    shots: Tensor
    w_plus: Tensor
    inverted: Tensor
    distribution: ClassDistribution | None
    weight_deltas: WeightDeltas | None = None


@dataclass(frozen=True, eq=False)
class Result:
    """Generated images, on the CPU.

    Attributes:
        images: as the generator drew them [n, C, R, R] in [-1, 1].
        w_plus: their offsets from ``latent_avg`` [n, L, D].
        sources: int64 [n], the shot that each is fused with.
        fused: name of a fusion -> images [n, C, R, R] in [-1, 1].
    """

    images: Tensor
    w_plus: Tensor
    sources: Tensor
    fused: dict[str, Tensor]


class FewShotPipeline:
    """Shots of a novel category in, new images of it out.

    Args:
        generator, encoder: trained together, on one device.
        relevant: fitted dictionary of the seen categories.
        irrelevant: dictionary of the directions.
        codes: offsets of the seen images.
        preset: ``"paper"``, ``"released"`` or ``"default"``: the reading of editing and fusion.
        noise: the generator's noise the encoder was trained for, ``"none"`` or ``"const"``.
        hash: names the model in manifests.
        precision: of the products that draw images, see :data:`sage_fast.arithmetic.DRAWING_PRECISIONS`: ``"bfloat16"`` is
            faster and moves pixels by a few grey levels; float32 where the device does not multiply bfloat16, with a warning.
            Of ``"float32"`` and ``"tf32"`` PyTorch's settings decide, which :func:`sage_fast.generation.generate` sets. Shots are
            inverted in float32.
        inversion_device: where shots are inverted: ``"cpu"``, so that latents have the same bits whatever the device of the
            networks, or ``"model"``, beside them: on a GPU in much less time, with its rounding.
    Raises:
        InputError: parts of different numbers or widths of styles, or a setting that is none.
    """

    # of the class, for what was pickled before these were settings
    precision = "float32"
    inversion_device = "cpu"
    _copies: tuple[list[tuple[int, int]], list[Tensor], tuple[ImageEncoder, Generator]] | None = None

    def __init__(
        self,
        generator: Generator,
        encoder: ImageEncoder,
        relevant: CategoryRelevantDictionary,
        irrelevant: CategoryIrrelevantDictionary,
        codes: LatentTable,
        preset: str = "default",
        noise: str = "none",
        hash: str = "",
        precision: str = "float32",
        inversion_device: str = "cpu",
    ) -> None:
        if preset not in PRESETS:
            raise InputError(f"preset must be one of {', '.join(PRESETS)}, got '{preset}'.")
        if noise not in ("none", "const"):
            raise InputError(f"noise must be 'none' or 'const', so that a latent stands for one image, got '{noise}'.")
        check_parts(generator, encoder, irrelevant.directions, codes, "The parts of the pipeline")
        self.generator, self.encoder = generator.eval(), encoder.eval()
        self.relevant, self.irrelevant, self.codes = relevant, irrelevant, codes
        self.preset, self.noise, self.hash = preset, noise, hash
        self.precision, self.inversion_device = _usable(precision, self.device), inversion_device
        if inversion_device not in INVERSION_DEVICES:
            raise InputError(
                f"inversion_device must be one of {', '.join(INVERSION_DEVICES)}, got '{inversion_device}'."
            )
        self._editors: dict[str, FewShotEditor] = {}
        self._judged: set[int] = set()

    @classmethod
    def from_bundle(
        cls,
        path: str | os.PathLike[str] | None = None,
        device: str | torch.device = "cpu",
        preset: str = "default",
        precision: str = "float32",
        inversion_device: str = "cpu",
    ) -> FewShotPipeline:
        """The pipeline of a bundle folder; ``None`` is the model shipped with the package.

        Raises:
            InputError: see :func:`sage_fast.models.weights.load_bundle`.
        """
        bundle = load_bundle(path, device)
        codes = bundle.codes
        n_components = min(_N_COMPONENTS, len(codes.categories), codes.w_plus.shape[2])
        with one_thread():
            relevant = CategoryRelevantDictionary(n_components).fit(codes.w_plus, codes.labels)
        irrelevant = CategoryIrrelevantDictionary(*bundle.dictionary)
        return cls(
            bundle.generator, bundle.encoder, relevant, irrelevant, codes, preset, bundle.noise, bundle.hash, precision,
            inversion_device,
        )  # fmt: skip

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_copies": None}

    @property
    def device(self) -> torch.device:
        """Where the networks run."""
        return next(self.generator.parameters()).device

    def embed(self, images: Tensor) -> Tensor:
        """The offsets [N, L, D] of :meth:`invert`."""
        return self.invert(images).offsets

    @torch.no_grad()
    def invert(self, images: Tensor) -> Inversion:
        """Images to offsets from ``latent_avg`` (Eq. 3 of [SAGE]) and, for HyperStyle, to changes of the generator.

        One image at a time, on one thread: a code is the same to the last bit whatever else is inverted with it.

        Args:
            images: [N, C, R, R], uint8 or float in [-1, 1], N >= 1.
        Returns:
            offsets [N, L, D] and weight deltas, on the CPU.
        Raises:
            InputError: no images, of another size, or not scaled to [-1, 1].
        """
        encoder, generator = self._inverting()
        images = _float_images(images).to(generator.latent_avg.device)
        with one_thread():
            found = [encoder.invert(image[None], generator, self.noise) for image in images]
        offsets = torch.cat([inversion.offsets.float().cpu() for inversion in found])
        return Inversion(offsets, join_deltas([inversion.weight_deltas for inversion in found]))

    def _inverting(self) -> tuple[ImageEncoder, Generator]:
        """The networks that invert: beside a GPU copies of them in memory, made anew for other weights, unless that is to do it."""
        if self.inversion_device == "model" or self.device.type == "cpu":
            return self.encoder, self.generator
        weights = [t for network in (self.encoder, self.generator) for t in network.state_dict().values()]
        key = [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in weights]
        if self._copies is None or self._copies[0] != key:  # the weights are kept so that no others come to lie there
            copies = copy.deepcopy(self.encoder).cpu(), copy.deepcopy(self.generator).cpu()
            self._copies = key, weights, copies
        return self._copies[2]

    def adapt(self, shots: Tensor, method: str = "sage", **options: Any) -> ClassDistribution:
        """The distribution of a novel category (Eq. 15, 17-19 of [SAGE]) from its ``shots`` [K, C, R, R].

        Args:
            shots: as the images of :meth:`embed`.
            method: ``"age"``, ``"sage-q"``, ``"sage-i"`` or ``"sage"``.
            options: arguments of :class:`FewShotEditor` in place of the preset's.
        """
        return self._adapt(self.embed(shots), method, options)

    def _adapt(self, w_plus: Tensor, method: str, options: dict[str, Any]) -> ClassDistribution:
        with one_thread():
            return self._editor(method, len(w_plus), options).adapt(w_plus)

    def editor_settings(self, method: str, n_shots: int, **options: int) -> dict[str, Any]:
        """``n_components``, ``n_similar`` and ``n_directions`` as a method takes them, without those that it makes no use of.

        Args:
            n_shots: given images of the category.
            options: those that were given; the others are the preset's.
        Raises:
            InputError: options that the model or the method does not allow.
        """
        if method == "inversion":
            check_used(method, options)
            return {}
        editor = self._unfitted(method, n_shots, options)
        (n_components,) = editor.n_components
        settings = dict(n_components=n_components, n_similar=editor.n_similar, n_directions=editor.n_directions)
        return {name: value for name, value in settings.items() if name not in unused_settings(method)}

    def warn_of_mapping(self, n_components: int) -> None:
        """Warn, once for each ``n_components``, where class embedding mapping keeps too little of a new category."""
        if n_components in self._judged:
            return
        self._judged.add(n_components)
        sentence = mapping_warning(self.relevant, self.codes.w_plus, self.codes.labels, n_components)
        if sentence is not None:
            warnings.warn(sentence, SageFastWarning, stacklevel=3)

    def prepare(
        self, shots: Tensor, method: str = "sage", batch: int = 64, *, fused: bool = True, **options: Any
    ) -> NovelCategory:
        """What :meth:`draw` needs of a novel category; arguments of :meth:`adapt`, or method ``"inversion"``.

        ``fused`` False leaves out shots and reconstructions, which fusion alone needs.
        """
        if method == "inversion":
            check_used(method, options)
        inversion = self.invert(shots)
        w_plus, deltas = inversion.offsets, inversion.weight_deltas
        distribution = None if method == "inversion" else self._adapt(w_plus, method, options)
        if not fused:
            none = torch.empty(0, *shots.shape[1:])
            return NovelCategory(none, w_plus, none, distribution, deltas)
        inverted = self.render(w_plus, batch, deltas)
        return NovelCategory(_float_images(shots).cpu(), w_plus, inverted, distribution, deltas)

    def draw(
        self,
        novel: NovelCategory,
        numbers: Sequence[int],
        alpha: float | None = None,
        seed: int = 0,
        category: str = "",
        fusion: str | Sequence[str] = "none",
        batch: int = 64,
    ) -> Result:
        """Samples of the given numbers; each depends on its own number, the seed and the category's name alone.

        Whatever else is drawn, in whatever batches, latents are the same to the last bit, images to float rounding.
        Arguments as for :meth:`__call__`.
        """
        fusions = _fusions(fusion)
        with one_thread():
            w_plus = self._latents(novel, numbers, alpha, seed, category)
        sources = torch.tensor(numbers, dtype=torch.int64) % len(novel.w_plus)
        images = self.render(w_plus, batch, novel.weight_deltas, sources)
        fused = {name: self.fuse(name, novel, sources, images) for name in fusions}
        return Result(images, w_plus, sources, fused)

    def __call__(
        self,
        shots: Tensor,
        n: int = 128,
        alpha: float | None = None,
        method: str = "sage",
        fusion: str | Sequence[str] = "none",
        seed: int = 0,
        category: str = "",
        batch: int = 64,
        **options: Any,
    ) -> Result:
        """Generate ``n`` images of the category that ``shots`` show.

        Args:
            shots: [K, C, R, R], uint8 or float in [-1, 1].
            n: how many, at least 1.
            alpha: strength of the edit (Eq. 20); the preset's when absent (1, or 2 for ``"paper"``). Inversion has
                none.
            method: ``"age"``, ``"sage-q"``, ``"sage-i"``, ``"sage"``, or ``"inversion"``: the shots' reconstructions.
            fusion: ``"none"``, ``"pixel"``, ``"frequency"``, ``"both"``, or several of them; sample j is fused with
                shot j mod K.
            seed, category: the random numbers of sample j are a function of these two and j.
            batch: images the generator draws at a time.
            options: arguments of :class:`FewShotEditor` in place of the preset's.
        Raises:
            InputError: shots or a setting that cannot be used.
        """
        for name, value in (("n", n), ("batch", batch)):
            if value < 1:
                raise InputError(f"{name} must be at least 1, got {value}.")
        _fusions(fusion)
        novel = self.prepare(shots, method, batch, **options)
        if method in EDITOR_METHODS and EDITOR_METHODS[method]["class_embedding_mapping"]:
            self.warn_of_mapping(min(self._editor(method, len(shots), options).n_components))
        return self.draw(novel, range(n), alpha, seed, category, fusion, batch)

    @torch.no_grad()
    def render(
        self,
        w_plus: Tensor,
        batch: int = 64,
        weight_deltas: WeightDeltas | None = None,
        sources: Tensor | None = None,
    ) -> Tensor:
        """Offsets [N, L, D] to images [N, C, R, R] in [-1, 1] on the CPU.

        Args:
            batch: images drawn at a time.
            weight_deltas: of K shots, as :meth:`invert` gave them.
            sources: int64 [N], the shot whose deltas each image is drawn with; 0 to K - 1 when absent.
        """
        self.generator.check_w_plus(w_plus)
        if weight_deltas is not None:
            return self._render_with(
                w_plus, batch, weight_deltas, torch.arange(len(w_plus)) if sources is None else sources
            )
        # joined out here, so that the images are ordinary tensors
        return torch.cat([self.synthesize(part).cpu() for part in w_plus.split(batch)])

    @contextmanager
    def _drawing(self) -> Iterator[None]:
        """Inside, products have the precision of this pipeline, and no kernel is chosen by how long it takes."""
        with autocast(self.precision, self.device), repeatable():
            yield

    @torch.inference_mode()  # spares each op its way through autograd: a tenth of the time of small batches
    def synthesize(self, w_plus: Tensor) -> Tensor:
        """Offsets [n, L, D] to images [n, C, R, R] in [-1, 1], drawn together and left on the device of the networks."""
        G = self.generator
        G.check_w_plus(w_plus)
        with self._drawing():
            return G(w_plus.to(G.latent_avg) + G.latent_avg, noise=self.noise).float().clamp_(-1, 1)

    def fuse(self, name: str, novel: NovelCategory, sources: Tensor, images: Tensor) -> Tensor:
        """Generated images [n, C, R, R] fused with the shots of their numbers ``sources`` [n], on the images' device."""
        real, inverted = novel.shots, novel.inverted
        if len(real) > 1:  # one shot serves all
            real, inverted = real[sources], inverted[sources]
        return self._fuse(name, real.to(images.device), inverted.to(images.device), images).clamp_(-1, 1)

    def _render_with(self, w_plus: Tensor, batch: int, weight_deltas: WeightDeltas, sources: Tensor) -> Tensor:
        """The images of one shot after those of another: they share its weights."""
        G = self.generator
        images = torch.empty(len(w_plus), G.n_channels, G.resolution, G.resolution)
        for shot in sources.unique().tolist():
            deltas = select_deltas(weight_deltas, slice(shot, shot + 1), G.latent_avg.device)
            for part in torch.nonzero(sources == shot).flatten().split(batch):
                with self._drawing():
                    drawn = synthesize(G, w_plus[part].to(G.latent_avg) + G.latent_avg, deltas, self.noise)
                images[part] = drawn.float().clamp_(-1, 1).cpu()
        return images

    def _latents(
        self, novel: NovelCategory, numbers: Sequence[int], alpha: float | None, seed: int, category: str
    ) -> Tensor:
        if novel.distribution is None:
            check_used("inversion", [] if alpha is None else ["alpha"])
            return novel.w_plus[torch.tensor(numbers, dtype=torch.int64) % len(novel.w_plus)]
        parts = [novel.w_plus[:0]]
        for run in stretches(numbers):
            noise = [normals(seed, category, number, novel.distribution.n_random) for number in run]
            parts.append(novel.distribution.sample_with(torch.stack(noise), alpha, run.start))
        return torch.cat(parts)

    def _fuse(self, name: str, real: Tensor, inverted: Tensor, edited: Tensor) -> Tensor:
        if name == "frequency":
            return fuse_frequencies(real, inverted, edited, **_FREQUENCY[self.preset], reading=self.preset)
        if name == "pixel":
            return fuse_pixels(real, inverted, edited.clamp(-1, 1), **_PIXEL[self.preset], reading=self.preset)
        settings = _FREQUENCY[self.preset] | _PIXEL[self.preset]
        return fuse_both(real, inverted, edited, **settings, reading=self.preset)

    def _editor(self, method: str, n_shots: int, options: dict[str, Any]) -> FewShotEditor:
        """The fitted editor of a method; kept, since fitting reads every code."""
        key = repr((method, n_shots == 1, sorted(options.items())))  # presets tell one shot from more
        if key not in self._editors:
            self._editors[key] = self._unfitted(method, n_shots, options).fit(self.codes.w_plus, self.codes.labels)
        return self._editors[key]

    def _unfitted(self, method: str, n_shots: int, options: Mapping[str, Any]) -> FewShotEditor:
        """An editor with the preset's settings and others in place of them; t_B of "default" as the seen categories need it."""
        options = dict(options)
        if self.preset == "default" and "n_components" not in (*options, *unused_settings(method)):
            options["n_components"] = self._usual_components
        return FewShotEditor.preset(self.preset, self.relevant, self.irrelevant, n_shots, method, **options)

    @cached_property
    def _usual_components(self) -> int:
        return usual_components(self.relevant, self.codes.w_plus, self.codes.labels)


def _usable(precision: str, device: torch.device) -> str:
    """The precision that a pipeline on a device computes in; says so where it is another than was set.

    Raises:
        InputError: there is none of that name, or none on that device.
    """
    if precision not in DRAWING_PRECISIONS:
        raise InputError(f"precision must be one of {', '.join(DRAWING_PRECISIONS)}, got '{precision}'.")
    if precision == "tf32" and device.type != "cuda":
        raise InputError(f"precision 'tf32' is one of GPUs, and the model is on {device.type}; take 'float32'.")
    sentence = substitution(precision, device)
    if sentence is not None:
        warnings.warn(f"precision: {sentence}.", SageFastWarning, stacklevel=3)
    return computed(precision, device)


def load_dictionary(
    path: str | os.PathLike[str] | None = None,
) -> CategoryIrrelevantDictionary | CategoryRelevantDictionary | dict[str, Tensor]:
    """The dictionary of a bundle folder or of a file of AGE or SAGE, on the CPU.

    Returns:
        Of a bundle, and of the ``.pt`` of AGE or SAGE: the category-irrelevant dictionary; the latter edits layers 0-2 and
        3-5 alone. Of ``class_embeddings.pt``: the category-relevant dictionary of its categories, in the order of their
        names, with at most 10 components. Of ``ns.pt``: codes [n, 6, K] by category. Of ``n_distribution.npy``: ``mean``
        [2, K], ``mean_abs`` [2, K] and ``cov`` [2, K, K].
    Raises:
        InputError: see :func:`sage_fast.models.weights.load_directions`; or the file holds none of these.
    """
    if path is None or not path_of(path).is_file():
        return CategoryIrrelevantDictionary(*load_directions(path))
    found = read_published(path)
    if found.embeddings is not None:
        embeddings = torch.stack([found.embeddings[name] for name in sorted(found.embeddings)])
        return CategoryRelevantDictionary.from_class_embeddings(embeddings, min(10, len(embeddings)))
    if found.codes is not None or found.statistics is not None:
        return dict(found.codes or found.statistics or {})
    return CategoryIrrelevantDictionary.from_released(*published_directions(path))


def normals(seed: int, category: str, number: int, count: int) -> Tensor:
    """``count`` standard normal numbers, float32 [count], that depend on nothing but the arguments.

    A counter-based generator (Philox, Salmon et al. 2011) is keyed by SHA-256 of seed, category and number, so samples
    can be drawn in any order, any batch and on any machine.
    """
    text = f"{seed}\0{category}\0{number}".encode("utf-8", "surrogateescape")
    key = int.from_bytes(hashlib.sha256(text).digest()[:16], "little")
    return torch.from_numpy(np.random.Generator(np.random.Philox(key=key)).standard_normal(count, dtype=np.float32))


def _float_images(images: Tensor) -> Tensor:
    """uint8 or float images [N, C, R, R] to float32 in [-1, 1]."""
    if not torch.is_tensor(images):
        got = type(images).__name__
        raise InputError(f"images must be a tensor [N, C, R, R], got {got}; torch.from_numpy converts an array.")
    if images.ndim != 4 or len(images) == 0:
        raise InputError(f"images must be a batch [N, C, R, R] with N at least 1, got {list(images.shape)}.")
    if images.dtype == torch.uint8:
        return to_float(images)
    if not images.is_floating_point():
        raise InputError(f"images must be uint8, or floating point in [-1, 1], got {images.dtype}.")
    largest = float(images.abs().amax())
    if not largest <= _LARGEST:
        raise InputError(f"images must lie in [-1, 1], got values of size {largest:.4g}; scale them, or give uint8.")
    return images.float()


def stretches(numbers: Sequence[int], longest: int = 64) -> list[range]:
    """``numbers`` as stretches of at most ``longest`` neighbours, in their order: what is drawn together."""
    runs: list[range] = []
    for number in numbers:
        if runs and number == runs[-1].stop and len(runs[-1]) < longest:
            runs[-1] = range(runs[-1].start, number + 1)
        else:
            runs.append(range(number, number + 1))
    return runs


def _fusions(fusion: str | Sequence[str]) -> list[str]:
    """The fusions asked for, without ``"none"``."""
    names = list(fusion) if isinstance(fusion, Iterable) and not isinstance(fusion, str) else [fusion]
    for name in names:
        if name not in FUSIONS:
            raise InputError(f"fusion must be one of {', '.join(FUSIONS)}, got '{name}'.")
    return [name for name in names if name != "none"]
