"""A step of adversarial training: generator and discriminator, R1 every sixteenth step.

The rivals take the same step with the same weights: plain PyTorch inside our networks, and with ``--peer-path`` the
networks of NVlabs (in float32: their half precision is CUDA's). Time is that of a step plus a sixteenth of an R1 step;
optimizers are left out, they are torch's on all sides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from peers import load_trainers
from torch import Tensor
from torch.nn import functional as F

from sage_fast.models import stylegan2_layers
from sage_fast.models.discriminator import Discriminator
from sage_fast.models.stylegan2 import Generator
from sage_fast.training.losses import logistic_d, nonsaturating_g, r1_penalty

CONFIGS = {"32s": (32, 2048, 128), "64s": (64, 4096, 128)}
BATCH = 16


def plain_upfirdn2d(x, f, up=1, down=1, padding=0, flip_filter=False, gain=1.0):
    """What the networks ask for, as depthwise convolutions; the filter is symmetric."""
    c, pad = x.shape[1], [padding] * 4 if isinstance(padding, int) else padding
    taps = (f * gain).to(x.dtype).expand(c, 1, *f.shape)
    if up == 2:
        return F.conv_transpose2d(x, taps, stride=2, padding=1, groups=c)
    return F.conv2d(x, taps, stride=down, padding=(pad[2], pad[0]), groups=c)


def plain_modulated_conv2d(x, weight, style, demodulate=True, up=1, down=1, resample_filter=None, eps=1e-8):
    x = x * style[:, :, None, None]
    if up == 2:
        x = F.conv_transpose2d(x, weight.transpose(0, 1), stride=2)
        x = plain_upfirdn2d(x, resample_filter, padding=1, gain=4.0)
    else:
        x = F.conv2d(x, weight, padding=weight.shape[2] // 2)
    if demodulate:
        norm = style.square() @ weight.square().sum((2, 3)).t()
        x = x * torch.rsqrt(norm + eps)[:, :, None, None]
    return x


def plain_conv3x3(x, weight, stride=1):
    return F.conv2d(x, weight, stride=stride, padding=2 - stride)


def plain_bias_act(x, b, act="lrelu", gain=2**0.5, clamp=None):
    return F.leaky_relu(x + b.view(1, -1, *[1] * (x.ndim - 2)), 0.2) * gain


@contextmanager
def plain_ops() -> Iterator[None]:
    """The networks of this process take plain PyTorch inside."""
    plain = dict(upfirdn2d=plain_upfirdn2d, modulated_conv2d=plain_modulated_conv2d, bias_act=plain_bias_act)
    plain["conv3x3"] = plain_conv3x3
    ours = {name: getattr(stylegan2_layers, name) for name in plain}
    vars(stylegan2_layers).update(plain)
    try:
        yield
    finally:
        vars(stylegan2_layers).update(ours)


class Step:
    """One network pair's step and R1 step, as functions that return the losses."""

    def __init__(self, draw: Callable[[Tensor], Tensor], judge: Callable[[Tensor], Tensor], G, D) -> None:
        self.draw, self.judge, self.G, self.D = draw, judge, G, D

    def main(self, w_plus: Tensor, real: Tensor) -> Tensor:
        for p in (*self.G.parameters(), *self.D.parameters()):
            p.grad = None
        self.D.requires_grad_(False)
        fake = self.draw(w_plus)
        g_loss = nonsaturating_g(self.judge(fake).float())
        g_loss.backward()
        self.D.requires_grad_(True)
        d_loss = logistic_d(self.judge(real).float(), self.judge(fake.detach()).float())
        d_loss.backward()
        return torch.stack([g_loss.detach(), d_loss.detach()])

    def r1(self, real: Tensor) -> Tensor:
        real = real.clone().requires_grad_(True)
        penalty = r1_penalty(self.judge(real).float(), real)
        penalty.backward()
        return penalty.detach()[None]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_training_step(compare, request, name, precision):
    resolution, base, most = CONFIGS[name]
    torch.manual_seed(0)
    G = Generator(resolution, 512, 1, channel_base=base, channel_max=most)
    D = Discriminator(resolution, channel_base=base, channel_max=most)
    real, w_plus = torch.randn(BATCH, 3, resolution, resolution), torch.randn(BATCH, G.n_latent, 512)
    ours = Step(G.synthesis, D, G, D)
    contexts = {"ours": (ours, nullcontext), "plain PyTorch": (ours, plain_ops)}
    for peer, (net, draw, their_D, judge) in load_trainers(request.config.getoption("--peer-path"), G, D).items():
        contexts[peer] = (Step(draw, judge, net, their_D), nullcontext)
    compare.compiled = False  # torch.compile differentiates once only, and R1 asks for twice
    compare.tolerance, compare.rounds = 0.1 if precision == "bfloat16" else 1e-3, 5

    def call(who: str, part: str) -> Callable[[], Tensor]:
        step, context = contexts[who]

        def run() -> Tensor:
            bf16 = precision == "bfloat16" and step is ours
            with context(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                return step.main(w_plus, real) if part == "step" else step.r1(real)

        return run

    rows = {}
    for part in ("step", "R1"):
        rivals = {who: call(who, part) for who in contexts if who != "ours"}
        compare(f"{name}, N {BATCH}, {precision}, {part}", call("ours", part), rivals)
        if compare.rows:
            rows[part] = compare.rows[-1]
    if len(rows) == 2:
        mine = rows["step"]["ms"] + rows["R1"]["ms"] / 16
        ratios = {
            who: round(
                (rows["step"]["ratios"][who] * rows["step"]["ms"] + rows["R1"]["ratios"][who] * rows["R1"]["ms"] / 16)
                / mine,
                3,
            )
            for who in rows["step"]["ratios"]
        }
        compare.rows.append(
            {**rows["step"], "case": f"{name}, N {BATCH}, {precision}, in all", "ms": round(mine, 3), "ratios": ratios}
        )
