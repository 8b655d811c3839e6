"""One thread for all tests; the tiny model of :mod:`tiny_model` as a bundle, and shots for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_model import codes_that_do_not_span, tiny_codes, tiny_networks

from sage_fast import arithmetic
from sage_fast.data.latent_table import LatentTable
from sage_fast.data.writers import save_png
from sage_fast.factorization.category_irrelevant import layer_groups
from sage_fast.models.weights import save_bundle


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small lose more to threads that wait for each other than they gain, above all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def multiplied_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 is bfloat16 on every processor: where it is not multiplied, PyTorch rounds to it."""
    monkeypatch.setattr(arithmetic, "multiplies_bfloat16", lambda device_type: True)


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an 8 px bundle with a discriminator. Shared by all tests: copy it before changing it."""
    return _save(tmp_path_factory.mktemp("tiny") / "bundle")


@pytest.fixture(scope="session")
def bundle_of_few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with seen categories that do not span the latents. Shared by all tests."""
    generator, _, _ = tiny_networks()
    return _save(tmp_path_factory.mktemp("few") / "bundle", codes_that_do_not_span(generator.n_latent))


def _save(folder: Path, codes: LatentTable | None = None) -> Path:
    generator, encoder, discriminator = tiny_networks()
    usual, directions = tiny_codes(generator.n_latent)
    return save_bundle(
        folder,
        generator=generator,
        encoder=encoder,
        directions=directions,
        groups=layer_groups(generator.n_latent),
        codes=usual if codes is None else codes,
        discriminator=discriminator,
        about={"made_for": "tests"},
    )


@pytest.fixture(scope="session")
def tiny_shots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ImageFolder of two novel categories, ``lily`` with three images and ``rose`` with two, of unequal sizes."""
    folder, rng = tmp_path_factory.mktemp("tiny") / "novel", torch.Generator().manual_seed(5)
    for category, sides in (("lily", (8, 8, 21)), ("rose", (8, 16))):
        (folder / category).mkdir(parents=True)
        for i, side in enumerate(sides):
            coarse = torch.rand(1, 3, 2, 2, generator=rng) * 255
            image = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear").to(torch.uint8)[0]
            save_png(folder / category / f"{i}.png", image)
    return folder
