"""Each numbered equation of [SAGE] against the printed formula in NumPy; docs/equations.md is the table of them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from sage_fast.data.sampling import EpochSampler
from sage_fast.editing import METHODS, FewShotEditor
from sage_fast.factorization import (
    CategoryIrrelevantDictionary,
    CategoryRelevantDictionary,
    class_embeddings,
    residuals,
)
from sage_fast.factorization.category_irrelevant import (
    CodeMLP,
    commonality,
    layer_groups,
    orthogonal_loss,
    sparse_loss,
)
from sage_fast.fusion import fuse_frequencies, fuse_pixels, fusion_mask
from sage_fast.models.encoders import PyramidEncoder
from sage_fast.models.stylegan2 import Generator
from sage_fast.ops import edit_latents, gaussian_low_pass, project_onto_basis
from sage_fast.training.dictionary import DictionaryConfig, train_dictionary
from sage_fast.training.embed import embed_images
from sage_fast.training.losses import pixel_mse

S, N, L, D, K, R = 7, 42, 4, 10, 5, 3  # 8 px: four layers
rng = np.random.default_rng(0)
y = np.arange(N) % S
w = (rng.normal(size=(S, L, D))[y] + 0.4 * rng.normal(size=(N, L, D))).astype(np.float32)
A = rng.normal(size=(L, D, K)).astype(np.float32)
e = np.stack([w[y == s].mean(0) for s in range(S)])
delta_w = w - e[y]
n_hat = np.stack([delta_w[:, k] @ np.linalg.pinv(A[k]).T for k in range(L)], 1)
B_f = np.stack([np.linalg.svd(e[:, k].T, full_matrices=False)[0][:, :R] for k in range(L)])
real, inv, edited = rng.uniform(-1, 1, size=(3, 4, 3, 16, 16)).astype(np.float32)
T = torch.from_numpy


def equal(ours, printed, tolerance=1e-4):
    np.testing.assert_allclose(ours.detach().numpy(), printed, atol=tolerance, rtol=tolerance)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def apply_A(n):
    """A n per layer [N, L, D]."""
    return np.einsum("ldk,nlk->nld", A, n)


@pytest.fixture(scope="module")
def G():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = Generator(8, D, n_mapping=2, channel_base=64, channel_max=8).eval()
        made.latent_avg.copy_(made.mean_latent(100))
    return made


@pytest.fixture(scope="module")
def E():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = PyramidEncoder(8, L, D, channel_base=64, channel_max=8, head_width=4).eval()
        for heads in made.heads:
            heads.weight.data.mul_(30)  # starts near zero
    return made


@pytest.fixture(scope="module")
def dictionaries():
    return CategoryRelevantDictionary(R).fit(T(w), T(y)), CategoryIrrelevantDictionary(T(A))


@pytest.fixture(scope="module")
def distribution(dictionaries):
    """SAGE on three shots, with T = 3 of 7 categories and t_A = 2 of 5 directions."""
    return FewShotEditor(*dictionaries, n_similar=3, n_directions=2).fit(T(w), T(y)).adapt(T(w[:3]))


@torch.no_grad()
def test_eq_1_edit_is_the_image_of_a_moved_latent(G):
    n = np.eye(K, dtype=np.float32)[None, [0] * L]  # one direction in every layer
    moved = edit_latents(T(w[:1]), T(n), T(A), alpha=0.7)
    equal(G(moved, noise="none"), G(T(w[:1] + 0.7 * A[None, :, :, 0]), noise="none").numpy())


@torch.no_grad()
def test_eq_2_inversion_and_back(G, E):
    x = torch.from_numpy(rng.integers(0, 256, size=(5, 3, 8, 8), dtype=np.uint8))
    z = embed_images(x, E, G, batch=2) + G.latent_avg  # z = I(x)
    rebuilt = G(z, noise="none")  # x^ = G(z)
    assert rebuilt.shape == x.shape
    assert torch.equal(rebuilt, G(z, noise="none")) and not torch.allclose(rebuilt[0], rebuilt[1])


@torch.no_grad()
def test_eq_3_the_encoder_gives_one_latent_a_layer(G, E):
    x = rng.integers(0, 256, size=(5, 3, 8, 8), dtype=np.uint8)
    scaled = x.astype(np.float32) / 127.5 - 1
    equal(embed_images(T(x), E, G, batch=2), np.stack([E(T(i[None])).numpy()[0] for i in scaled]))


def test_eq_4_latents_are_class_embedding_plus_residual():
    embeddings = class_embeddings(T(w), T(y))
    equal(embeddings[T(y)] + residuals(T(w), T(y), embeddings), w)


def test_eq_5_class_embedding_is_the_mean():
    equal(class_embeddings(T(w), T(y)), [sum(w[i] for i in range(N) if y[i] == s) / (N / S) for s in range(S)])


def test_eq_6_an_irrelevant_edit_keeps_the_category():
    irrelevant = A - np.einsum("ldr,ler,lek->ldk", B_f, B_f, A)  # directions that do not touch B_f
    n = rng.normal(size=(N, L, K)).astype(np.float32)
    moved = edit_latents(T(w), T(n), T(irrelevant), alpha=2.0)
    equal(moved, w + 2.0 * np.einsum("ldk,nlk->nld", irrelevant, n))
    basis = T(np.ascontiguousarray(B_f))
    equal(project_onto_basis(moved, basis), project_onto_basis(T(w), basis).numpy())


def test_eq_7_residual_is_latent_minus_class_embedding():
    equal(residuals(T(w), T(y), T(e)), np.stack([w[i] - e[y[i]] for i in range(N)]))


def test_eq_8_edits_are_combinations_of_directions(dictionaries):
    n = rng.normal(size=(6, L, K)).astype(np.float32) * (rng.random((6, L, K)) < 0.5)
    equal(dictionaries[1].inverse_transform(T(n)), np.stack([[A[k] @ n[i, k] for k in range(L)] for i in range(6)]))
    found = dictionaries[1].transform(dictionaries[1].inverse_transform(T(n)))  # independent directions: only this n
    np.testing.assert_array_equal(found.abs() > 1e-4, n != 0)


@torch.no_grad()
def test_eq_9_code_is_an_mlp_of_the_residual():
    mlp = CodeMLP(layer_groups(L), L, D, K)
    codes = mlp(T(delta_w))
    for group, net in zip(layer_groups(L), mlp.networks, strict=True):
        x = delta_w[:, group].reshape(N, -1)
        linear = [m for m in net if isinstance(m, torch.nn.Linear)]
        for i, layer in enumerate(linear):
            x = x @ layer.weight.numpy().T + layer.bias.numpy()
            x = x if i == len(linear) - 1 else np.where(x > 0, x, 0.2 * x)
        for k in group:
            equal(codes[:, k], x, 1e-5)


def test_eq_10_sparsity():
    printed = sum(np.abs(sigmoid(0.5 * n - (-1))).sum() for n in n_hat) / N
    equal(sparse_loss(T(n_hat), 0.5, -1.0, "paper"), printed)
    repaired = sum(sigmoid(0.5 * np.abs(n) - 1).sum() for n in n_hat)
    equal(sparse_loss(T(n_hat), 0.5, -1.0, "default"), repaired / N)
    equal(sparse_loss(T(n_hat), 0.5, -1.0, "released"), repaired / 32)  # L = 4: all layers are among its six


def test_eq_11_reconstruction():
    equal(pixel_mse(T(edited), T(real)), ((edited - real) ** 2).mean(), 1e-6)


def test_eq_12_orthogonal_directions_keep_the_responses_of_the_categories():
    B = np.linalg.svd(e[:, 0])[2]  # [D, D]: the last rows are normal to all S class embeddings of layer 0
    normal = T(np.ascontiguousarray(B[S:].T))[None].expand(L, D, D - S).clone()
    n = rng.normal(size=(1, L, D - S)).astype(np.float32)
    changed = edit_latents(T(e[:1]), T(n), normal)
    np.testing.assert_allclose(e[:, 0] @ changed[0, 0].numpy(), e[:, 0] @ e[0, 0], atol=1e-4)  # B^T w = B^T e
    assert orthogonal_loss(normal[:1], T(e[:, :1]), "paper") < 1e-8


def test_eq_13_orthogonality():
    products = np.stack([e[:, k] @ A[k] for k in range(L)])  # B^T A
    equal(orthogonal_loss(T(A), T(e), "paper"), sum(np.linalg.norm(p) ** 2 for p in products))
    equal(orthogonal_loss(T(A), T(e), "released"), np.abs(products).sum() / (K * S * L))
    unit = e / np.linalg.norm(e, axis=2, keepdims=True)
    equal(orthogonal_loss(T(A), T(e)), sum(np.linalg.norm(unit[:, k] @ A[k]) ** 2 for k in range(L)))


def test_eq_14_total_loss_of_the_first_step(tmp_path, G):
    """The first line of the log, from the same start: Eq. 9, 10, 11 and 13 with their weights."""
    images = torch.from_numpy(rng.integers(0, 256, size=(N, 3, 8, 8), dtype=np.uint8))
    config = DictionaryConfig(n_directions=K, total_steps=1, batch=16, init="normal", lambda1=0.01, lambda2=0.02,
                              latent_weight=0.5, rec_weight=2.0, log_every=1)  # fmt: skip
    train_dictionary(config, T(w), T(y), images, G, None, tmp_path)
    log = json.loads((tmp_path / "logs" / "dictionary.jsonl").read_text().splitlines()[0])

    start = torch.Generator().manual_seed(config.seed)
    groups = layer_groups(L)
    A0 = np.concatenate([torch.randn(len(g), D, K, generator=start).numpy() for g in groups])
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        mlp = CodeMLP(groups, L, D, K)
    i = EpochSampler(N, 16, config.seed).next().numpy()
    with torch.no_grad():
        n = mlp(T(delta_w[i])).numpy()
        edit = np.einsum("ldk,nlk->nld", A0, n)
        rebuilt = G(T(e[y[i]] + edit) + G.latent_avg, noise="none").numpy()
    unit = e / np.linalg.norm(e, axis=2, keepdims=True)
    terms = {
        "rec": ((rebuilt - (images[i].numpy() / 127.5 - 1)) ** 2).mean(),
        "orth": (np.einsum("sld,ldk->lsk", unit, A0) ** 2).sum(),
        "sparse": sigmoid(0.5 * np.abs(n) - 1).sum() / 16,
        "latent": ((edit - delta_w[i]) ** 2).mean(),
    }
    for name, value in terms.items():
        assert log[name] == pytest.approx(value, rel=1e-3), name
    weights = {"rec": 2.0, "orth": 0.01, "sparse": 0.02, "latent": 0.5}
    assert log["loss"] == pytest.approx(sum(weights[name] * value for name, value in terms.items()), rel=1e-3)


def test_eq_15_age_edits_the_shots_with_codes_of_all_categories(dictionaries):
    beta = float(np.median(np.abs(n_hat)))
    age = FewShotEditor(*dictionaries, **METHODS["age"], beta=beta).fit(T(w), T(y)).adapt(T(w[:2]))
    eps = rng.normal(size=(5, N)).astype(np.float32)
    n = n_hat.mean(0) + np.einsum("jm,mlk->jlk", eps, n_hat - n_hat.mean(0)) / np.sqrt(N - 1)
    kept = np.mean([np.abs(n_hat[y == s]).mean(0) for s in range(S)], 0) > beta
    printed = [w[j % 2] + 1.5 * apply_A(kept * n[j][None])[0] for j in range(5)]
    equal(age.sample_with(T(eps), alpha=1.5), printed, 1e-3)


def test_eq_16_basis_is_the_leading_left_singular_vectors(dictionaries):
    for k in range(L):
        U, sigma, _ = np.linalg.svd(e[:, k].T)  # B = [e^1 ... e^S], [D, S]
        cosines = np.abs((U[:, :R] * dictionaries[0].basis_[k].numpy()).sum(0))
        np.testing.assert_allclose(cosines, 1, atol=1e-4)  # the sign of a singular vector is free
        equal(dictionaries[0].singular_values_[k], sigma)


def test_eq_17_class_embedding_is_the_mean_projection(distribution):
    printed = np.mean([[B_f[k] @ B_f[k].T @ w[i, k] for k in range(L)] for i in range(3)], 0)
    equal(distribution.class_embedding, printed)


def test_eq_18_codes_are_the_pseudo_inverse_of_the_residuals(dictionaries):
    equal(dictionaries[1].transform(T(delta_w)), n_hat, 1e-3)


def test_eq_19_commonality_and_the_directions_it_keeps(distribution):
    equal(commonality(T(n_hat), T(y)), sum(np.abs(n_hat[y == s]).sum(0) / (N / S) for s in range(S)) / S)
    similar = distribution.similar_categories.tolist()
    common = np.mean([np.abs(n_hat[y == s]).mean(0) for s in similar], 0)
    top = np.stack([common[k] >= np.sort(common[k])[-2] for k in range(L)])  # t_A = 2
    np.testing.assert_array_equal(distribution.direction_mask, top)


def test_eq_20_new_latents(distribution):
    codes = n_hat[np.isin(y, distribution.similar_categories.numpy())]
    m = len(codes)
    np.testing.assert_allclose(distribution.mean, codes.mean(0), atol=1e-4)  # mu
    np.testing.assert_allclose(
        distribution.covariance(), np.cov(codes.reshape(m, -1), rowvar=False), atol=1e-3
    )  # Sigma
    eps = rng.normal(size=(5, m)).astype(np.float32)
    n = codes.mean(0) + np.einsum("jm,mlk->jlk", eps, codes - codes.mean(0)) / np.sqrt(m - 1)  # ~ N(mu, Sigma)
    printed = distribution.class_embedding.numpy() + 2 * apply_A(distribution.direction_mask.numpy() * n)
    equal(distribution.sample_with(T(eps)), printed, 1e-3)


def test_eq_21_mask():
    norm = lambda x: np.sqrt(((x / 2) ** 2).sum(1))  # noqa: E731  of images in [0, 1], over channels
    sharp = np.pad(norm(real - inv) - 0.5 * norm(edited - inv), ((0, 0), (1, 1), (1, 1)), mode="reflect")
    g = np.exp(-np.array([1, 0, 1]) / (2 * 1.3**2))
    kernel = np.outer(g, g) / g.sum() ** 2
    blurred = sum(kernel[a, b] * sharp[:, a : a + 16, b : b + 16] for a in range(3) for b in range(3))
    equal(fusion_mask(T(real), T(inv), T(edited), beta=0.5)[:, 0], blurred.clip(0, 1), 1e-6)


def test_eq_22_pixel_fusion():
    mask = fusion_mask(T(real), T(inv), T(edited)).numpy()
    unit = lambda x: (x + 1) / 2  # noqa: E731
    printed = fuse_pixels(T(real), T(inv), T(edited), blend="printed")
    equal(unit(printed), unit(edited) + mask * unit(real), 1e-6)
    equal(fuse_pixels(T(real), T(inv), T(edited)), edited + mask * (real - inv), 1e-6)
    equal(fuse_pixels(T(real), T(inv), T(edited), blend="convex"), edited * (1 - mask) + real * mask, 1e-6)


def test_eq_23_frequency_fusion():
    d2 = np.add.outer(np.fft.fftfreq(16, 1 / 16) ** 2, np.fft.fftfreq(16, 1 / 16) ** 2)
    low = lambda x: np.fft.ifft2(np.fft.fft2(x) * np.exp(-d2 / (2 * 5**2))).real  # noqa: E731
    equal(gaussian_low_pass(T(real)), low(real), 1e-5)
    fused = fuse_frequencies(T(real), T(inv), T(edited), gamma1=0.8, gamma2=0.3)
    printed_low = 0.8 * low(edited) + (low(real) - 0.3 * low(inv))
    equal(fused, edited - low(edited) + printed_low, 1e-5)


def test_the_table_names_every_equation_and_its_test():
    page = Path(__file__).parents[1] / "docs" / "equations.md"
    rows = dict(re.findall(r"^\| (\d+) \|.*`(test_eq_\d+\w*)`", page.read_text(), re.MULTILINE))
    assert sorted(map(int, rows)) == list(range(1, 24))
    for number, test in rows.items():
        assert test in globals() and test.startswith(f"test_eq_{number}_")
