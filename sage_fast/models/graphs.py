"""A whole synthesis as one CUDA graph: small batches are bound by launches, and a graph is launched once."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from sage_fast.errors import InputError
from sage_fast.models.inference import choose_road, counter_noise, fused_network
from sage_fast.models.stylegan2 import Generator, Noise

__all__ = ["GraphedSynthesis"]

_WARM_UP = 3  # calls before the capture: cuDNN chooses its algorithms, weights are prepared


class GraphedSynthesis:
    """``generator.synthesis`` for one batch size, captured once and replayed; a plain call where there is no GPU.

    Captured at the first call, and again when a weight of the generator has changed or a noise map was replaced. On the CPU and
    on roads other than the fused one it only calls the generator, with the same results.

        draw = GraphedSynthesis(generator, batch=8, dtype=torch.bfloat16, noise="counter")
        images = draw(w_plus, samples=torch.arange(8))

    Args:
        generator: for inference; its device and weights are those at the time of a call.
        batch: images a call.
        dtype: of the products, float32, bfloat16 or float16.
        noise: ``"const"`` the stored maps, ``"none"``, or ``"counter"``, maps that depend on ``seed`` and on each sample's number,
            drawn inside the graph.
        seed: of ``"counter"``.
    Raises:
        InputError: a setting out of range; when called, latents of another shape, or samples without ``"counter"`` or none with it.
    """

    def __init__(
        self,
        generator: Generator,
        batch: int,
        dtype: torch.dtype = torch.float32,
        noise: Literal["const", "none", "counter"] = "const",
        seed: int = 0,
    ) -> None:
        if batch < 1:
            raise InputError(f"batch must be at least 1, got {batch}.")
        if noise not in ("const", "none", "counter"):
            raise InputError(f"noise must be 'const', 'none' or 'counter', got {noise!r}.")
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise InputError(f"dtype must be float32, bfloat16 or float16, got {dtype}.")
        self.generator, self.batch, self.dtype, self.noise, self.seed = generator, batch, dtype, noise, seed
        self._graph: torch.cuda.CUDAGraph | None = None
        self._captured: tuple[object, list[int]] | None = None

    @torch.no_grad()
    def __call__(self, w_plus: Tensor, samples: Tensor | None = None) -> Tensor:
        """Draw images.

        Args:
            w_plus: [batch, L, D] absolute latents.
            samples: int64 [batch], the number of each sample, with ``noise="counter"`` only.
        Returns:
            [batch, C, R, R]. On a GPU the graph's own buffer: the next call overwrites it.
        """
        device = self.generator.latent_avg.device
        expected = (self.batch, self.generator.n_latent, self.generator.style_dim)
        if w_plus.shape != expected:
            raise InputError(f"w_plus must have shape {list(expected)} for this graph, got {list(w_plus.shape)}.")
        if (samples is not None) != (self.noise == "counter"):
            raise InputError("samples must be given with noise='counter', and only then.")
        if samples is not None and samples.shape != (self.batch,):
            raise InputError(f"samples must have shape [{self.batch}], got {list(samples.shape)}.")
        w_plus, samples = w_plus.to(device), None if samples is None else samples.to(device)
        if device.type != "cuda" or choose_road(self.generator, w_plus)[0] != "fused":
            return self._draw(w_plus, samples)
        network, maps = fused_network(self.generator), [m.data_ptr() for m in self.generator.noises.buffers()]
        if self._captured is None or self._captured[0] is not network or self._captured[1] != maps:
            self._capture(w_plus, samples)
            self._captured = network, maps
        self._w_plus.copy_(w_plus)
        if samples is not None and self._samples is not None:
            self._samples.copy_(samples)
        assert self._graph is not None
        self._graph.replay()
        return self._images

    def _capture(self, w_plus: Tensor, samples: Tensor | None) -> None:
        self._w_plus = w_plus.clone(memory_format=torch.contiguous_format)
        self._samples = None if samples is None else samples.clone()
        # of its device: torch's own for captures is one for the process, of the device that captured first
        side = torch.cuda.Stream(w_plus.device)
        side.wait_stream(torch.cuda.current_stream(w_plus.device))
        with torch.cuda.stream(side):  # torch asks for a stream of its own while it warms up
            for _ in range(_WARM_UP):
                self._draw(self._w_plus, self._samples)
        torch.cuda.current_stream(w_plus.device).wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(w_plus.device), torch.cuda.graph(self._graph, stream=side):
            self._images = self._draw(self._w_plus, self._samples)

    def _draw(self, w_plus: Tensor, samples: Tensor | None) -> Tensor:
        noise: Noise = "none" if self.noise == "none" else "const"
        if samples is not None:
            noise = counter_noise(self.generator, samples, self.seed)
        low = self.dtype != torch.float32
        with torch.autocast(w_plus.device.type, self.dtype if low else torch.bfloat16, enabled=low):
            return self.generator.synthesis(w_plus, noise=noise)
