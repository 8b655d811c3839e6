"""Few-shot image generation with attribute dictionaries on StyleGAN2.

The public names below are read from their own files at first use: ``import sage_fast`` is free and changes nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sage_fast import ops as ops
    from sage_fast.augmenter import Augmenter as Augmenter
    from sage_fast.editing.editor import FewShotEditor as FewShotEditor
    from sage_fast.errors import InputError as InputError
    from sage_fast.errors import SageFastWarning as SageFastWarning
    from sage_fast.factorization.category_irrelevant import (
        CategoryIrrelevantDictionary as CategoryIrrelevantDictionary,
    )
    from sage_fast.factorization.category_relevant import CategoryRelevantDictionary as CategoryRelevantDictionary
    from sage_fast.fusion import fuse_frequencies as fuse_frequencies
    from sage_fast.fusion import fuse_pixels as fuse_pixels
    from sage_fast.fusion import gaussian_low_pass as gaussian_low_pass
    from sage_fast.models.stylegan2 import truncate as truncate
    from sage_fast.models.weights import load_bundle as load_bundle
    from sage_fast.models.weights import load_discriminator as load_discriminator
    from sage_fast.models.weights import load_encoder as load_encoder
    from sage_fast.models.weights import load_generator as load_generator
    from sage_fast.pipeline import FewShotPipeline as FewShotPipeline
    from sage_fast.pipeline import load_dictionary as load_dictionary

__version__ = "0.1.0"

_HOMES = {
    "Augmenter": "augmenter",
    "CategoryIrrelevantDictionary": "factorization.category_irrelevant",
    "CategoryRelevantDictionary": "factorization.category_relevant",
    "FewShotEditor": "editing.editor",
    "FewShotPipeline": "pipeline",
    "InputError": "errors",
    "SageFastWarning": "errors",
    "fuse_frequencies": "fusion",
    "fuse_pixels": "fusion",
    "gaussian_low_pass": "fusion",
    "load_bundle": "models.weights",
    "load_dictionary": "pipeline",
    "load_discriminator": "models.weights",
    "load_encoder": "models.weights",
    "load_generator": "models.weights",
    "truncate": "models.stylegan2",
}

__all__ = ["__version__", "ops", *_HOMES]


def __getattr__(name: str) -> Any:
    if name == "ops":
        return import_module("sage_fast.ops")
    if name not in _HOMES:
        raise AttributeError(f"module 'sage_fast' has no attribute {name!r}")
    return getattr(import_module(f"sage_fast.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
