"""A step of adversarial training: generator and discriminator, R1 every sixteenth step.

The step is the plainest, for all: both updates on the same fakes, a pass of the discriminator for each kind (``train_gan``
draws new fakes, and takes both kinds in one pass). The rivals take it with the same weights: plain PyTorch inside our networks,
and with ``--peer-path`` the networks of NVlabs as published: on a CPU in float32, on a GPU in float16 at the four largest
sizes, whatever the row's precision is, which is ours and plain PyTorch's. On a GPU ours is also replayed as CUDA graphs. Time
is that of a step plus a sixteenth of an R1 step; optimizers are left out, they are torch's on all sides. Peak memory is that of
both steps above the networks and their batch.

    pytest benchmarks/bench_training_step.py --benchmark-enable --bench-device cuda --peer-path ~/stylegan3
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from memory import peak_mib, printed_by_a_process
from peers import load_trainers
from torch import Tensor
from torch.nn import functional as F

from sage_fast.arithmetic import multiplies_bfloat16
from sage_fast.models import stylegan2_layers
from sage_fast.models.discriminator import Discriminator
from sage_fast.models.stylegan2 import Generator
from sage_fast.ops.convolution import second_derivatives
from sage_fast.training.graphed import Networks
from sage_fast.training.losses import logistic_d, nonsaturating_g, r1_penalty

CONFIGS = {"32s": (32, 2048, 128), "64s": (64, 4096, 128), "256p": (256, 16384, 512)}  # 256p: on a GPU
PRECISIONS = ["float32", "bfloat16", "tf32"]  # tf32: float32 with TF32 products, on a GPU
BATCH = 16


def plain_upfirdn2d(x, f, up=1, down=1, padding=0, flip_filter=False, gain=1.0):
    """What the networks ask for, as depthwise convolutions; the filter is symmetric."""
    c, pad = x.shape[1], [padding] * 4 if isinstance(padding, int) else padding
    taps = (f * gain).to(x.dtype).expand(c, 1, *f.shape)
    if up == 2:
        return F.conv_transpose2d(x, taps, stride=2, padding=1, groups=c)
    return F.conv2d(x, taps, stride=down, padding=(pad[2], pad[0]), groups=c)


def plain_unscaled_conv2d(x, weight, style, demodulate=True, up=1, down=1, resample_filter=None, eps=1e-8, scale=1.0):
    x, weight = x * style[:, :, None, None], weight * scale
    if up == 2:
        x = F.conv_transpose2d(x, weight.transpose(0, 1), stride=2)
        x = plain_upfirdn2d(x, resample_filter, padding=1, gain=4.0)
    else:
        x = F.conv2d(x, weight, padding=weight.shape[2] // 2)
    norm = style.square() @ weight.square().sum((2, 3)).t() if demodulate else None
    return x, None if norm is None else torch.rsqrt(norm + eps)


def plain_scaled_bias_act(x, scale, noise, strength, b, gain=2**0.5, clamp=None):
    x = x if scale is None else x * scale[:, :, None, None].to(x.dtype)  # float32 factors would widen bfloat16 maps
    x = x if noise is None else x + (strength * noise).to(x.dtype)
    return plain_bias_act(x, b, gain=gain)


def plain_conv3x3(x, weight, stride=1, scale=1.0):
    return F.conv2d(x, weight * scale, stride=stride, padding=2 - stride)


def plain_bias_act(x, b, act="lrelu", gain=2**0.5, clamp=None):
    return F.leaky_relu(x + b.to(x.dtype).view(1, -1, *[1] * (x.ndim - 2)), 0.2) * gain


@contextmanager
def plain_ops() -> Iterator[None]:
    """The networks of this process take plain PyTorch inside."""
    plain: dict[str, Callable] = dict(
        upfirdn2d=plain_upfirdn2d, unscaled_conv2d=plain_unscaled_conv2d, bias_act=plain_bias_act
    )
    plain |= dict(scaled_bias_act=plain_scaled_bias_act)
    plain |= dict(conv3x3=plain_conv3x3, conv2d=F.conv2d)
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
        with second_derivatives():  # which the rivals' networks do not ask for
            penalty = r1_penalty(self.judge(real).float(), real)
        penalty.backward()
        return penalty.detach()[None]


class GraphedStep(Step):
    """Ours with both networks replayed as CUDA graphs, as ``train_gan`` does with ``graphs``: reals and fakes in one pass."""

    def __init__(self, G: Generator, D: Discriminator, precision: str) -> None:
        super().__init__(G.synthesis, D, G, D)
        self.networks = Networks(G, D, precision, graphs=True)

    def main(self, w_plus: Tensor, real: Tensor) -> Tensor:
        for p in (*self.G.parameters(), *self.D.parameters()):
            p.grad = None
        self.D.requires_grad_(False)
        noise = [maps.expand(len(w_plus), -1, -1, -1) for maps in self.G.noises.buffers()]
        fake = self.networks.fakes(w_plus.detach().requires_grad_(), noise)
        g_loss = nonsaturating_g(self.networks.logits(fake).float())
        g_loss.backward()
        self.D.requires_grad_(True)
        of_reals, of_fakes = self.networks.logits_of_both(real, fake.detach())
        d_loss = logistic_d(of_reals.float(), of_fakes.float())
        d_loss.backward()
        return torch.stack([g_loss.detach(), d_loss.detach()])


def steps(
    name: str, device: torch.device, peers: list[str], precision: str = "float32"
) -> tuple[dict[str, tuple[Step, Callable]], Tensor, Tensor]:
    """who -> step and the context it runs in; latents and images of a batch."""
    resolution, base, most = CONFIGS[name]
    torch.manual_seed(0)
    G = Generator(resolution, 512, 1, channel_base=base, channel_max=most).to(device)
    D = Discriminator(resolution, channel_base=base, channel_max=most).to(device)
    real = torch.randn(BATCH, 3, resolution, resolution, device=device)
    w_plus = torch.randn(BATCH, G.n_latent, 512, device=device)
    ours = Step(G.synthesis, D, G, D)
    found: dict[str, tuple[Step, Callable]] = {"ours": (ours, nullcontext), "plain PyTorch": (ours, plain_ops)}
    if device.type == "cuda":
        found["ours, graphs"] = (GraphedStep(G, D, precision), nullcontext)
    for peer, (net, draw, their_D, judge) in load_trainers(peers, G, D).items():
        found[peer] = (Step(draw, judge, net, their_D), nullcontext)
    return found, w_plus, real


def lowered(device: torch.device, precision: str, who: str) -> AbstractContextManager:
    """Autocast for us and for plain PyTorch; NVlabs' networks choose float16 themselves."""
    enabled = precision == "bfloat16" and who in ("ours", "plain PyTorch")
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", CONFIGS)
def test_training_step(compare, request, name, precision):
    skip_on_a_cpu(compare.device, name, precision)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    contexts, w_plus, real = steps(name, compare.device, request.config.getoption("--peer-path"), precision)
    compare.compiled = False  # torch.compile differentiates once only, and R1 asks for twice
    compare.tolerance = 1e-3 if precision == "float32" and compare.device.type == "cpu" else 0.1
    compare.rounds = 5

    def call(who: str, part: str) -> Callable[[], Tensor]:
        step, context = contexts[who]

        def run() -> Tensor:
            with context(), lowered(compare.device, precision, who):
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


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", CONFIGS)
def test_memory(compare, request, name, precision):
    """On a CPU each side in a process of its own."""
    skip_on_a_cpu(compare.device, name, precision)
    if compare.benchmark.disabled:
        pytest.skip("nothing to compare")
    peers = [peer for peer in request.config.getoption("--peer-path") if (Path(peer) / "training").is_dir()]  # NVlabs'
    used = {}
    for who in ["ours", "plain PyTorch", *peers]:
        about = (name, precision, who)
        if compare.device.type == "cuda":
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
            used[Path(who).name] = peak(compare.device, *about)
        else:
            used[Path(who).name] = printed_by_a_process(__file__, *about, torch.get_num_threads())
    compare.rows.append(dict(case=f"{name}, N {BATCH}, {precision}", mib=used))


def skip_on_a_cpu(device: torch.device, name: str, precision: str) -> None:
    if device.type == "cpu" and precision == "bfloat16" and not multiplies_bfloat16("cpu"):
        pytest.skip("this processor does not multiply bfloat16: training computes in float32")
    if device.type == "cpu" and (name == "256p" or precision == "tf32"):
        pytest.skip("for a GPU")


def peak(device: torch.device, name: str, precision: str, who: str) -> float:
    """``who``: "ours", "plain PyTorch" or a clone's folder."""
    contexts, w_plus, real = steps(name, device, [] if who in ("ours", "plain PyTorch") else [who])
    step, context = contexts.get(who) or list(contexts.values())[-1]

    def both(n: int) -> None:
        with context(), lowered(device, precision, who):
            step.main(w_plus[:n], real[:n])
            step.r1(real[:n])

    both(1)  # loads code; gradients are held from here on
    return peak_mib(lambda: both(BATCH), device)


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[4]))
    print(peak(torch.device("cpu"), *sys.argv[1:4]))
