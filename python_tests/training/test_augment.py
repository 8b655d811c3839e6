"""Augmentation as a trainer calls it: one convention for every kind, the adaptive strength, settings."""

from __future__ import annotations

import json

import pytest
import torch

from sage_fast.errors import InputError
from sage_fast.training.augment import Augment, AugmentConfig
from sage_fast.training.losses import r1_penalty

KINDS = [
    AugmentConfig("ada", p=0.7),
    AugmentConfig("ada", transforms="bgcfnc", p=0.5),
    AugmentConfig("diffaugment"),
]
kinds = pytest.mark.parametrize("config", KINDS, ids=lambda config: f"{config.kind} {config.transforms}")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def augmented(config: AugmentConfig, images: torch.Tensor, seed: int = 0) -> torch.Tensor:
    augment = Augment(config)
    return augment.apply(images, augment.draw(len(images), seeded(seed)))


@pytest.mark.parametrize("config", [AugmentConfig(), AugmentConfig("ada", p=0.0), AugmentConfig("ada")])
def test_none_p_zero_and_the_start_of_adaptive_give_the_images_back(config):
    x = torch.randn(4, 3, 9, 8)
    assert torch.equal(augmented(config, x), x)


@kinds
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [(16, 16), (13, 10), (3, 2)])
def test_shares_of_a_batch_see_what_the_whole_batch_sees(config, channels, size):
    augment, x = Augment(config), torch.randn(8, channels, *size)
    draws = augment.draw(8, seeded())
    whole = augment.apply(x, draws)
    assert whole.shape == x.shape and whole.isfinite().all() and not torch.equal(whole, x)
    again = augment.draw(8, seeded())  # as another rank draws it
    halves = [augment.apply(x[part], again[part]) for part in (slice(0, 4), slice(4, 8))]
    assert torch.equal(torch.cat(halves), whole)
    index = torch.tensor([6, 1, 1])
    assert torch.equal(augment.apply(x[index], draws[index]), whole[index])
    mask = torch.arange(8) % 3 == 0
    assert torch.equal(augment.apply(x[mask], draws[mask]), whole[mask])
    assert torch.equal(augment.apply(x[5:6], draws[2:][3]), whole[5:6])


@kinds
def test_what_is_drawn_depends_on_the_generator_alone(config):
    torch.manual_seed(1)
    one = augmented(config, torch.ones(4, 3, 8, 8).cumsum(3))
    torch.manual_seed(2)
    assert torch.equal(augmented(config, torch.ones(4, 3, 8, 8).cumsum(3)), one)
    assert not torch.equal(augmented(config, torch.ones(4, 3, 8, 8).cumsum(3), seed=1), one)


@kinds
def test_precisions_and_layouts(config):
    x = torch.randn(4, 3, 12, 12, dtype=torch.float64)
    exact = augmented(config, x)
    single = augmented(config, x.float())
    assert exact.dtype == torch.float64 and single.dtype == torch.float32
    assert (single - exact).abs().max() < 1e-4
    last = augmented(config, x.float().to(memory_format=torch.channels_last))
    assert torch.equal(last, single) and last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(augmented(config, x.float().transpose(2, 3).contiguous().transpose(2, 3)), single)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(augmented(config, x.float()), single)
    for dtype in (torch.bfloat16, torch.float16):
        low = x.to(dtype)
        assert torch.equal(augmented(config, low), augmented(config, low.float()).to(dtype))


@kinds
def test_a_gpu_gives_what_the_cpu_gives(config):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    augment, results = Augment(config), []
    for device in ("cpu", "cuda"):
        x = torch.randn(6, 3, 16, 16, generator=seeded(1)).to(device).requires_grad_()
        y = augment.apply(x, augment.draw(6, seeded()))
        (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        gradient.square().sum().backward()
        results.append([t.detach().cpu() for t in (y, gradient, x.grad)])
    for one, other in zip(*results):
        assert (one - other).abs().max() < 1e-3 * one.abs().max()


@kinds
def test_r1_of_augmented_images(config):
    """Against the penalty by the Jacobian of the augmentation, written out: derivatives with respect to a weight agree."""
    augment, x = Augment(config), torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    draws = augment.draw(2, seeded(5))
    weight = torch.randn(48, dtype=torch.float64, requires_grad=True)
    logits = (augment.apply(x, draws).flatten(1) * weight).tanh().sum(1, keepdim=True)
    ours = torch.autograd.grad(r1_penalty(logits, x), weight)[0]

    total = torch.zeros((), dtype=torch.float64)
    for i in range(2):
        one = x[i : i + 1].detach()
        jacobian = torch.autograd.functional.jacobian(lambda x, i=i: augment.apply(x, draws[i]).flatten(), one)
        slope = (1 - (augment.apply(one, draws[i]).flatten() * weight).tanh() ** 2) * weight
        total = total + (slope @ jacobian.view(48, 48)).square().sum() / 2
    assert torch.allclose(ours, torch.autograd.grad(total, weight)[0], rtol=1e-9, atol=1e-12)


@kinds
def test_r1_in_training_precision(config):
    augment, x = Augment(config), torch.randn(4, 3, 16, 16, requires_grad=True)
    network = torch.nn.Conv2d(3, 1, 16)
    with torch.autocast("cpu", torch.bfloat16):
        logits = network(augment.apply(x, augment.draw(4, seeded()))).tanh()
        r1_penalty(logits, x).backward()
    assert network.weight.grad.isfinite().all() and network.weight.grad.abs().max() > 0


def test_p_moves_as_the_formula_says():
    augment = Augment(AugmentConfig("ada", target=0.5, interval=2, speed_kimg=0.1))  # 16 logits move by 0.16
    high, low = torch.ones(8, 1), torch.tensor([[3.0]] * 4 + [[-0.1]] * 4)
    history = []
    for logits in (high, high, high, low, low, low, low, high, high, high):
        augment.observe(logits)
        history.append(round(augment.p, 9))
    # mean signs of the pairs: 1, 0.5 (the target itself), 0, 0.5, 1
    assert history == [0, 0.16, 0.16, 0.16, 0.16, 0.0, 0.0, 0.0, 0.0, 0.16]


def test_p_stays_within_zero_and_one_and_counts_uneven_batches():
    augment = Augment(AugmentConfig("ada", interval=2, speed_kimg=0.01))
    augment.observe(torch.ones(3))
    augment.observe(torch.ones(1))
    assert augment.p == 4 / 10
    for _ in range(4):
        augment.observe(torch.ones(8))
    assert augment.p == 1
    for _ in range(4):
        augment.observe(-torch.ones(8))
    assert augment.p == 0


def test_a_fixed_p_and_other_kinds_do_not_move():
    for config, p in ((AugmentConfig("ada", p=0.3), 0.3), (AugmentConfig("diffaugment"), 1.0), (AugmentConfig(), 0.0)):
        augment = Augment(config)
        for _ in range(10):
            augment.observe(torch.ones(8))
        assert augment.p == p


def test_a_checkpoint_continues_bit_for_bit():
    config, rng = AugmentConfig("ada", interval=3, speed_kimg=0.3), seeded()
    steps = [torch.randn(7, 1, generator=rng) + 0.7 for _ in range(20)]
    whole = Augment(config)
    for logits in steps:
        whole.observe(logits)
    first, second = Augment(config), Augment(config)
    for logits in steps[:10]:  # in the middle of an interval
        first.observe(logits)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for logits in steps[10:]:
        second.observe(logits)
    assert whole.p > 0 and second.p == whole.p and second.state_dict() == whole.state_dict()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(kind="DA"), "kind of augmentation must be none, ada or diffaugment, got 'DA'"),
        (
            dict(kind="ada", transforms="gc"),
            "transforms of augmentation must be b, bg, bgc, bgcf, bgcfn or bgcfnc, got 'gc'",
        ),
        (dict(kind="ada", p=1.5), "p is a probability, expected 0 to 1 or None"),
        (dict(kind="ada", p=float("nan")), "p must be a finite number, got nan"),
        (dict(kind="ada", target=2.0), "target is a mean of signs, expected -1 to 1, got 2.0"),
        (dict(kind="ada", interval=0), "interval must be a whole number of steps, at least 1, got 0"),
        (dict(kind="ada", speed_kimg=0.0), "speed_kimg must be positive, got 0.0"),
        (dict(kind="diffaugment", policy="colour"), "policy must be some of color,translation,cutout, each once, got"),
        (dict(kind="diffaugment", policy=""), "policy must be some of"),
        (dict(kind="diffaugment", policy="color,color"), "each once"),
        (dict(kind="diffaugment", p=0.5), "p = 0.5 would be ignored by augmentation 'diffaugment'; leave it out"),
        (dict(transforms="b"), "transforms = 'b' would be ignored by augmentation 'none'"),
        (dict(kind="ada", p=0.5, target=0.7), "target = 0.7 would be ignored by augmentation 'ada' with a fixed p"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        AugmentConfig(**settings)


def test_bad_calls_are_named():
    augment = Augment(AugmentConfig("ada", p=0.5))
    draws, x = augment.draw(4, seeded()), torch.zeros(4, 3, 8, 8)
    for images, message in (
        (x[0], r"images must be floating point \[N, C, H, W\] with 1 to 4 channels, got torch.float32 \[3, 8, 8\]"),
        (x.to(torch.uint8), "got torch.uint8"),
        (torch.zeros(4, 5, 8, 8), r"got torch.float32 \[4, 5, 8, 8\]"),
        (torch.zeros(4, 3, 0, 8), "images must have at least one pixel"),
        (x[:2], "draws must be for the 2 images given, got 4; index them as the images"),
    ):
        with pytest.raises(InputError, match=message):
            augment.apply(images, draws)
    with pytest.raises(InputError, match="index does not fit draws for 4 images"):
        draws[torch.tensor([4])]
    with pytest.raises(InputError, match="state of augmentation must have"):
        augment.load_state_dict({"p": 0.5})
    with pytest.raises(InputError, match="has p = 0.4, but the settings fix it at 0.5"):
        augment.load_state_dict(augment.state_dict() | {"p": 0.4})


def test_no_images():
    for config in KINDS:
        assert augmented(config, torch.zeros(0, 3, 8, 8)).shape == (0, 3, 8, 8)
