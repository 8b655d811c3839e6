"""A synthesis as a CUDA graph, and its plain fallback on the CPU."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch

from sage_fast import _native
from sage_fast.errors import InputError
from sage_fast.models import graphs
from sage_fast.models.graphs import GraphedSynthesis
from sage_fast.models.inference import counter_noise
from sage_fast.models.stylegan2 import Generator


@pytest.fixture(params=["cpu", "cuda"])
def device(request) -> str:
    native = _native.load()
    if request.param not in native.devices:
        pytest.skip(f"no kernels on '{request.param}': {native.reasons[request.param]}")
    return request.param


@pytest.fixture
def G(device) -> Generator:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Generator(16, 11, 1, channels=[24, 16, 9])
        for layer in (network.conv1, *network.convs):
            torch.nn.init.normal_(layer.noise.weight, std=0.3)
    return network.eval().requires_grad_(False).to(device)


def latents(n: int, seed: int) -> torch.Tensor:
    return torch.randn(n, 6, 11, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("noise", ["const", "none", "counter"])
def test_the_same_images_as_a_plain_call(G, device, noise, dtype):
    draw = GraphedSynthesis(G, 3, dtype, noise, seed=5)
    for seed in (1, 2):  # the second is a replay with other input
        w_plus, samples = latents(3, seed), torch.tensor([4, seed, 0]) if noise == "counter" else None
        maps = noise if samples is None else counter_noise(G, samples.to(device), 5)
        with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
            expected = G.synthesis(w_plus.to(device), noise=maps)
        tolerance = 1e-5 if dtype == torch.float32 else 0.02
        torch.testing.assert_close(draw(w_plus, samples), expected, atol=tolerance, rtol=tolerance)


def test_a_changed_weight_is_captured_anew(G, device):
    draw, w_plus = GraphedSynthesis(G, 2), latents(2, 0)
    before = draw(w_plus).clone()
    G.convs[0].conv.weight.mul_(1.5)
    after = draw(w_plus)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, G.synthesis(w_plus.to(device)), atol=1e-5, rtol=1e-5)


def test_parameters_with_gradients_are_no_hindrance(G):
    draw, w_plus = GraphedSynthesis(G, 2), latents(2, 0)
    before = draw(w_plus).clone()
    G.requires_grad_(True)
    assert torch.equal(draw(w_plus), before) and not draw(w_plus).requires_grad


@pytest.fixture
def on_a_second_gpu(monkeypatch) -> dict[str, list]:
    """Where nothing is a GPU: what a generator there is drawn by, and what torch is asked for."""
    asked: dict[str, list] = {"draws": [], "streams": [], "captures": []}

    class Stream:
        def __init__(self, device: torch.device) -> None:
            asked["streams"].append((self, device))

        def wait_stream(self, other: object) -> None:
            pass

    @contextlib.contextmanager
    def capture(graph, stream=None):
        asked["captures"].append(stream)
        yield

    fakes = {"Stream": Stream, "graph": capture, "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None)}
    fakes |= {"stream": lambda stream: contextlib.nullcontext(), "device": lambda device: contextlib.nullcontext()}
    fakes |= {"current_stream": lambda device: Stream(device)}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    network = object()
    monkeypatch.setattr(graphs, "choose_road", lambda *_: ("fused", ""))
    monkeypatch.setattr(graphs, "fused_network", lambda generator: network)
    monkeypatch.setattr(GraphedSynthesis, "_draw", lambda self, *_: asked["draws"].append(self))
    return asked


class Latents:
    """Of a GPU that is not there."""

    shape, device = (2, 6, 11), torch.device("cuda:1")

    def to(self, device: torch.device) -> Latents:
        return self

    def clone(self, memory_format: torch.memory_format) -> Latents:
        return self

    def copy_(self, other: Latents) -> None:
        pass


def test_a_capture_is_on_a_stream_of_the_generators_device(on_a_second_gpu):
    maps = torch.nn.Module()
    maps.register_buffer("noise_0", torch.zeros(1, 1, 4, 4))
    average = SimpleNamespace(device=Latents.device)
    draw = GraphedSynthesis(SimpleNamespace(latent_avg=average, n_latent=6, style_dim=11, noises=maps), 2)
    draw(Latents())
    (stream, device), *_ = on_a_second_gpu["streams"]
    assert on_a_second_gpu["captures"] == [stream] and device == Latents.device
    draw(Latents())
    maps.noise_0.fill_(1)  # what a replay reads
    draw(Latents())
    assert len(on_a_second_gpu["captures"]) == 1
    maps.noise_0 = torch.ones(1, 1, 4, 4)  # what it would not
    draw(Latents())
    assert len(on_a_second_gpu["captures"]) == 2


def test_bad_input(G):
    with pytest.raises(InputError, match="batch must be at least 1"):
        GraphedSynthesis(G, 0)
    with pytest.raises(InputError, match="noise must be 'const', 'none' or 'counter'"):
        GraphedSynthesis(G, 1, noise="random")
    with pytest.raises(InputError, match="dtype must be float32, bfloat16 or float16"):
        GraphedSynthesis(G, 1, torch.float64)
    draw = GraphedSynthesis(G, 2)
    with pytest.raises(InputError, match=r"w_plus must have shape \[2, 6, 11\] for this graph, got \[3, 6, 11\]"):
        draw(latents(3, 0))
    with pytest.raises(InputError, match="samples must be given with noise='counter'"):
        draw(latents(2, 0), torch.arange(2))
    with pytest.raises(InputError, match=r"samples must have shape \[2\]"):
        GraphedSynthesis(G, 2, noise="counter")(latents(2, 0), torch.arange(3))
