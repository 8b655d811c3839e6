"""Whatever the number of ranks and micro-batches, a batch is the same batch."""

from __future__ import annotations

import pytest
import torch

from sage_fast.errors import InputError
from sage_fast.models.discriminator import Discriminator, group_size
from sage_fast.training.gan import GANConfig
from sage_fast.training.shares import logits_of_both, path_share, share_out


@pytest.mark.parametrize(
    "batch, group, n_ranks, accumulate", [(16, 4, 2, 2), (8, 4, 1, 2), (12, 4, 3, 1), (18, 3, 2, 3), (6, 1, 2, 3)]
)
def test_every_sample_is_dealt_once(batch, group, n_ranks, accumulate):
    dealt = [share for rank in range(n_ranks) for share in share_out(batch, group, rank, n_ranks, accumulate)]
    assert len({len(share) for share in dealt}) == 1
    assert torch.cat(dealt).sort().values.tolist() == list(range(batch))
    halves = torch.cat([path_share(share, group) for share in dealt]).sort().values
    assert halves.tolist() == list(range(len(halves)))  # the first half of the batch, a third where a group is three


@pytest.mark.parametrize("parts", [(1, 2), (2, 1), (2, 2)])
def test_the_discriminator_groups_a_share_as_it_groups_the_batch(parts):
    torch.manual_seed(0)
    D = Discriminator(8, channel_base=64, channel_max=8, mbstd_group=4).double()
    images = torch.randn(16, 3, 8, 8, dtype=torch.float64)
    whole = D(images)
    for rank in range(parts[0]):
        for share in share_out(16, 4, rank, *parts):
            torch.testing.assert_close(D(images[share]), whole[share], rtol=1e-10, atol=1e-12)
    assert not torch.allclose(D(images[:8]), whole[:8], rtol=1e-6)  # consecutive samples are other groups


def test_a_share_of_everything_is_the_batch_in_order():
    assert torch.equal(share_out(12, 4)[0], torch.arange(12))


def test_what_cannot_be_dealt():
    with pytest.raises(InputError) as caught:
        share_out(24, 4, n_ranks=2, accumulate=2)
    assert str(caught.value) == (
        "batch must be a multiple of 16 (2 ranks x 2 micro-batches x mbstd_group 4, the images that share a standard deviation), "
        "got 24; give batch 16 or 32, or mbstd_group 3 or 6."
    )
    with pytest.raises(InputError, match="a multiple of 28 .*got 7; give batch 28[.]$"):
        share_out(7, 4, accumulate=7)


@pytest.mark.parametrize(
    ("batch", "group", "remedy"),
    [(6, 4, "4 or 8, or mbstd_group 3 or 6"), (10, 4, "8 or 12, or mbstd_group 2 or 5"), (7, 4, "4 or 8, or mbstd_group 7"),
     (5, 4, "4 or 8, or mbstd_group 5"), (8, 3, "6 or 9, or mbstd_group 2 or 4"), (2, 4, "4, or mbstd_group 2")],
)  # fmt: skip
def test_a_batch_that_the_groups_do_not_divide_is_refused_with_what_fits(batch, group, remedy):
    with pytest.raises(InputError, match=f"must be a multiple of {group} .*, got {batch}; give batch {remedy}[.]$"):
        GANConfig(batch=batch, mbstd_group=group)
    batches, groups = remedy.split(", or mbstd_group ")
    for fitting in batches.split(" or "):
        GANConfig(batch=int(fitting), mbstd_group=group)
    for fitting in groups.split(" or "):
        GANConfig(batch=batch, mbstd_group=int(fitting))


def test_group_size():
    assert [group_size(n, 4) for n in (16, 6, 5, 2, 9)] == [4, 3, 1, 2, 3] and group_size(64, 8) == 8
    assert group_size(6, None) == 6 and group_size(0, 4) == 1


@pytest.mark.parametrize("n_classes", [0, 3])
@pytest.mark.parametrize(
    ("n", "most", "passes"), [(8, 4, 1), (6, 3, 1), (6, 4, 2), (5, 4, 2), (4, 1, 1), (2, 8, 2), (4, None, 2)]
)
def test_reals_and_fakes_in_one_pass_have_the_logits_of_two(n, most, passes, n_classes):
    torch.manual_seed(0)
    D = Discriminator(8, channel_base=64, channel_max=8, c_dim=n_classes, mbstd_group=most).double()
    reals, fakes = torch.randn(2, n, 3, 8, 8, dtype=torch.float64)
    labels = torch.eye(n_classes, dtype=torch.float64)[torch.arange(n) % n_classes] if n_classes else None
    expected, calls = (D(reals, labels), D(fakes, labels)), []
    D.register_forward_hook(lambda *_: calls.append(1))
    for one, two in zip(logits_of_both(D, reals, fakes, labels), expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)
    assert len(calls) == passes
