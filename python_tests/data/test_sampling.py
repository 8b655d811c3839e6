"""The order of training images: complete, even over classes, and restored from two integers."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sage_fast.data.sampling import EpochSampler
from sage_fast.errors import InputError

SKEWED = [0] * 50 + [1] * 7 + [2] * 1 + [5] * 12  # class 3 and 4 have no images


def draw(sampler: EpochSampler, n_batches: int) -> torch.Tensor:
    return torch.cat([sampler.next() for _ in range(n_batches)])


@pytest.mark.parametrize(("n", "batch"), [(10, 3), (7, 7), (3, 8), (1, 5), (64, 1)])
def test_an_epoch_is_every_image_once_and_no_image_is_dropped(n, batch):
    sampler = EpochSampler(n, batch, seed=3)
    stream = draw(sampler, 4 * n)  # 4 * batch epochs
    assert stream.dtype == torch.int64 and stream.shape == (4 * n * batch,)
    for epoch in stream.view(-1, n):
        assert sorted(epoch.tolist()) == list(range(n))
    assert (sampler.epoch, sampler.position) == (4 * batch, 0)


def test_the_order_is_a_function_of_seed_and_epoch():
    first, again, other = (draw(EpochSampler(100, 10, seed=s), 20).view(2, 100) for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first[0], first[1]), "epochs have orders of their own"
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[1], other[0]), "epoch 1 of seed 0 is not epoch 0 of seed 1"
    larger = draw(EpochSampler(100, 40, seed=0), 5).view(2, 100)
    assert torch.equal(first, larger), "the size of the batch only cuts the stream"


def test_the_order_stays_as_it_is():
    """Runs are resumed with later versions: these numbers may never change."""
    assert EpochSampler(10, 10, seed=0).next().tolist() == PLAIN
    assert EpochSampler(6, 9, seed=0, labels=[0, 0, 0, 0, 1, 1], balance=True).next().tolist() == BALANCED


PLAIN = [0, 7, 4, 9, 2, 1, 6, 8, 5, 3]
BALANCED = [1, 4, 3, 5, 4, 2, 0, 5, 5]


def test_places_are_evenly_taken():
    """Each image stands at each place equally often: chi-squared over 4000 epochs of 8 images."""
    stream = draw(EpochSampler(8, 8, seed=5), 4000).view(4000, 8).numpy()
    counts = np.stack([np.bincount(stream[:, place], minlength=8) for place in range(8)])
    chi_squared = ((counts - 500) ** 2 / 500).sum()  # 49 degrees of freedom; 99.99 % below 99
    assert chi_squared < 99


@pytest.mark.parametrize("seed", [-1, 2**64 + 5, 2**31])
def test_any_integer_is_a_seed(seed):
    assert sorted(EpochSampler(9, 9, seed=seed).next().tolist()) == list(range(9))


@pytest.mark.parametrize("balance", [False, True])
@settings(max_examples=30, deadline=None)
@given(before=st.integers(0, 40), batch=st.integers(1, 200), seed=st.integers(-5, 5))
def test_the_state_alone_restores_the_stream_bit_for_bit(balance, before, batch, seed):
    whole = EpochSampler(70, batch, seed, SKEWED, balance)
    draw(whole, before) if before else None
    state = whole.state_dict()
    assert set(state) == {"epoch", "position"} and all(type(v) is int for v in state.values())
    restored = EpochSampler(70, batch, seed, SKEWED, balance)
    restored.load_state_dict(state)
    skipped = EpochSampler(70, batch, seed, SKEWED, balance)
    skipped.skip(before)
    expected = draw(whole, 5)
    assert torch.equal(draw(restored, 5), expected)
    assert torch.equal(draw(skipped, 5), expected)


def test_skipping_far_takes_no_time():
    sampler = EpochSampler(1_000, 32, seed=0)
    start = time.perf_counter()
    sampler.skip(10**12)
    assert time.perf_counter() - start < 0.1
    assert sampler.epoch * 1_000 + sampler.position == 32 * 10**12
    assert sampler.next().shape == (32,)


def test_balance_shows_each_class_equally_often_in_each_epoch():
    sampler = EpochSampler(70, 1, seed=2, labels=SKEWED, balance=True)
    assert sampler.epoch_length == 72, "70 images of 4 classes: 18 rounds"
    for _ in range(5):
        labels = torch.tensor(SKEWED)[draw(sampler, 72)]
        assert torch.bincount(labels).tolist() == [18, 18, 18, 0, 0, 18]


def test_balance_is_even_in_any_run_of_draws():
    labels = torch.tensor(SKEWED)[draw(EpochSampler(70, 7, seed=2, labels=SKEWED, balance=True), 60)]
    for start in range(0, 400, 13):
        for length in (4, 9, 20):
            counts = torch.bincount(labels[start : start + length], minlength=6)[[0, 1, 2, 5]]
            assert counts.max() - counts.min() <= 2


def test_balance_shows_all_images_of_a_class_before_any_comes_again():
    stream = draw(EpochSampler(70, 72, seed=2, labels=torch.tensor(SKEWED), balance=True), 25)
    for label in (0, 1, 2, 5):
        members = [i for i, of in enumerate(SKEWED) if of == label]
        shown = [i for i in stream.tolist() if SKEWED[i] == label]
        for start in range(0, len(shown) - len(members), len(members)):
            assert sorted(shown[start : start + len(members)]) == members
    first, second = ([i for i in e.tolist() if SKEWED[i] == 5][:12] for e in (stream[:72], stream[72:144]))
    assert first != second


def test_ranks_share_the_global_batch():
    whole = EpochSampler(50, 8, seed=0)
    ranks = [EpochSampler(50, 8, seed=0) for _ in range(3)]
    for _ in range(10):
        shares = [sampler.next()[rank::3] for rank, sampler in enumerate(ranks)]
        assert sorted(torch.cat(shares).tolist()) == sorted(whole.next().tolist())


def test_a_hundred_thousand_images_are_ordered_in_a_moment():
    sampler = EpochSampler(100_000, 64, seed=0, labels=np.arange(100_000) % 200, balance=True)
    start = time.perf_counter()
    sampler.next()
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(n=0, batch=4), "at least one image and a batch of at least 1, got 0 and 4"),
        (dict(n=4, batch=0), "got 4 and 0"),
        (dict(n=4, batch=2, balance=True), "one integer label for each of the 4 images, got none"),
        (dict(n=4, batch=2, balance=True, labels=[0, 1]), r"got int64 \[2\]"),
        (dict(n=2, batch=2, balance=True, labels=[0.5, 1.0]), "got float64"),
    ],
)
def test_bad_settings(arguments, message):
    with pytest.raises(InputError, match=message):
        EpochSampler(**arguments)


@pytest.mark.parametrize(
    "state",
    [{}, {"epoch": 0}, {"epoch": -1, "position": 0}, {"epoch": 0, "position": 10}, {"epoch": 0.0, "position": 1}],
)
def test_a_state_of_another_sampler_is_refused(state):
    sampler = EpochSampler(10, 4)
    with pytest.raises(InputError, match="an epoch and a position below 10"):
        sampler.load_state_dict(state)
    assert sampler.state_dict() == {"epoch": 0, "position": 0}
    with pytest.raises(InputError, match="n_batches must be at least 0"):
        sampler.skip(-1)
