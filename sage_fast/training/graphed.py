"""The networks of an adversarial training, called or replayed: a step on a GPU is thousands of launches, which Python takes longer
for than the GPU does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from sage_fast.arithmetic import autocast
from sage_fast.models.inference import layer_by_layer
from sage_fast.models.stylegan2 import Discriminator, Generator
from sage_fast.training.shares import logits_of_both

__all__ = ["Networks"]


class Networks:
    """What an update asks of a generator and a discriminator: first derivatives only; regularisers call the networks themselves.

    With ``graphs`` each of the three functions is captured at its first call, forward and backward, as CUDA graphs
    (``torch.cuda.make_graphed_callables``), and replayed from then on: batches of one size, one forward before its backward, one
    backward an update. Images, logits and gradients are buffers that the next replay overwrites. Every function keeps its own
    activations, so memory is the sum of both updates' instead of the larger one.

    Args:
        precision: ``"bfloat16"`` for autocast, as :func:`sage_fast.arithmetic.autocast`.
        graphs: needs a GPU; the parameters must stay where they are from the first call on.
    """

    def __init__(self, G: Generator, D: Discriminator, precision: str = "float32", graphs: bool = False) -> None:
        self.device, self.precision, self.graphs = G.latent_avg.device, precision, graphs
        self._fakes, self._judge, self._judge_both = _Fakes(G), _Judge(D), _JudgeBoth(D)
        self._captured: set[nn.Module] = set()

    def fakes(self, w_plus: Tensor, noise: Sequence[Tensor]) -> Tensor:
        """Images [N, C, R, R] of ``w_plus`` [N, L, D] with noise maps [N, 1, h, w]."""
        with layer_by_layer() if self.device.type == "cuda" else nullcontext():
            return self._call(self._fakes, w_plus, *noise)

    def logits(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits [N, 1] for the generator's update: the discriminator's parameters must not require gradients."""
        return self._call(self._judge, images, *(() if labels is None else (labels,)))

    def logits_of_both(self, reals: Tensor, fakes: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits [N, 1] of reals and of fakes for the discriminator's update: its parameters must require gradients."""
        return self._call(self._judge_both, reals, fakes, *(() if labels is None else (labels,)))

    def _call(self, network: nn.Module, *arguments: Tensor) -> Any:
        if network in self._captured:
            return network(*arguments)
        # a graph must not hold the copy of a weight in 16 bits that autocast keeps for the next call
        with autocast(self.precision, self.device, keep_copies=not self.graphs):
            if not self.graphs:
                return network(*arguments)
            samples = tuple(x.detach().clone().requires_grad_(x.requires_grad) for x in arguments)
            with _capturing_on(self.device):
                # memory of its own for each function: in a pool for all, activations that one keeps for its backward would be free
                # once it is captured, and lie where the next function, which is replayed between, has its own
                torch.cuda.make_graphed_callables(network, samples, allow_unused_input=True)
        self._captured.add(network)
        return network(*arguments)


@contextmanager
def _capturing_on(device: torch.device) -> Iterator[None]:
    """Inside, torch captures graphs on ``device``, where it would on the one that is current, or that captured first: its stream
    for captures is one for the process.
    """
    graph = torch.cuda.graph
    before = graph.default_capture_stream
    with torch.cuda.device(device):
        graph.default_capture_stream = torch.cuda.Stream()
        try:
            yield
        finally:
            graph.default_capture_stream = before


class _Fakes(nn.Module):
    def __init__(self, G: Generator) -> None:
        super().__init__()
        self.G = G

    def forward(self, w_plus: Tensor, *noise: Tensor) -> Tensor:
        return self.G(w_plus, noise=list(noise))


class _Judge(nn.Module):
    def __init__(self, D: Discriminator) -> None:
        super().__init__()
        self.D = D

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.D(images, labels)


class _JudgeBoth(nn.Module):
    def __init__(self, D: Discriminator) -> None:
        super().__init__()
        self.D = D

    def forward(self, reals: Tensor, fakes: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return logits_of_both(self.D, reals, fakes, labels)
