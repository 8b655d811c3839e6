"""One update of an optimizer from the micro-batches of a batch, and the guard that stops before a bad one."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from sage_fast.data.writers import write_json
from sage_fast.errors import InputError
from sage_fast.training.runtime import Run

__all__ = ["Guard", "Update", "block_norms", "load_optimizer"]

_KEPT = 64  # steps whose losses a diagnosis shows; on a GPU the host looks once in as many


def load_optimizer(optim: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a saved state, but keep the learning rates and the fused kernels that ``optim`` was made with.

    A run may go on with another rate, and runs of before were not fused.
    """
    kept = [{name: group[name] for name in ("lr", "fused", "foreach")} for group in optim.param_groups]
    groups = [saved | own for saved, own in zip(state["param_groups"], kept, strict=True)]
    optim.load_state_dict(state | {"param_groups": groups})


class Update:
    """The gradients of one loss over the micro-batches and the ranks, and the step that follows from them.

    Args:
        name: of the loss, in messages.
        optim: a fused optimizer: on a GPU it skips what ``guard`` found bad.
        guard: looks at the loss before the step.
        accumulate: micro-batches of a rank's share of a batch.
    """

    def __init__(self, name: str, optim: torch.optim.Optimizer, guard: Guard, accumulate: int = 1) -> None:
        self.name, self.optim, self.guard, self.accumulate = name, optim, guard, accumulate
        self.parameters = [p for group in optim.param_groups for p in group["params"]]
        self.loss: Tensor | None = None
        optim.found_inf = guard.bad  # type: ignore[attr-defined]

    def add(self, loss: Tensor, weight: float = 1.0) -> None:
        """Backward of ``weight * loss`` of one micro-batch."""
        if self.loss is None:
            self.optim.zero_grad(set_to_none=True)
        (loss * (weight / self.accumulate)).backward()
        mean = loss.detach() / self.accumulate
        self.loss = mean if self.loss is None else self.loss + mean

    def apply(self, *shared: Tensor) -> Tensor:
        """One step of the optimizer, unless the loss is not finite; returns the loss of the whole batch, unweighted.

        Args:
            shared: tensors that become, in place, their means over the ranks, in the same exchange.
        """
        assert self.loss is not None
        loss, self.loss = self.loss, None
        return self.step(loss, *shared)

    def step(self, loss: Tensor, *shared: Tensor) -> Tensor:
        """:meth:`apply` for gradients that another backward pass has left, that of ``loss``, which becomes its mean over the ranks."""
        self.guard.run.ranks.average_gradients(self.parameters, [loss, *shared])
        self.guard.check(self.name, loss)
        self.optim.step()
        return loss


@dataclass
class _Step:
    number: int
    index: Tensor | None  # of the batch's images
    losses: dict[str, Tensor] = field(default_factory=dict)


class Guard:
    """Stops a run before the update with a loss that is not finite, and writes down what is known about it.

    On a CPU it stops at once. On a GPU the bad update, and every one after it, is skipped on the device (fused
    optimizers read ``found_inf``) and the host looks at most 64 steps later, so that no step waits for it.

    Args:
        run: that is stopped; the diagnosis is ``logs/<stage>_diagnosis.json`` in its folder.
        networks: that learn: whose weights and gradients it lists, and which must be finite to be saved.
        changes: of the settings that may help, for the message.
    """

    def __init__(self, run: Run, networks: Mapping[str, nn.Module], changes: Sequence[str] = ()) -> None:
        self.run, self.networks, self.changes = run, networks, changes
        self.path = run.folder / "logs" / f"{run.stage}_diagnosis.json"
        self.bad = torch.zeros([], dtype=torch.float32, device=run.ranks.device)  # the dtype that fused optimizers read
        self.steps: deque[_Step] = deque(maxlen=_KEPT)

    def begin(self, step: int, index: Tensor | None = None) -> None:
        """A step begins, with the images of these indices, where they are known."""
        self.steps.append(_Step(step, index))
        if step % _KEPT == 0:
            self.look()

    def check(self, name: str, loss: Tensor) -> None:
        """Call before the update that follows from ``loss``.

        Raises:
            InputError: it is not finite (on a CPU; elsewhere :meth:`look` raises).
        """
        self.steps[-1].losses[name] = loss
        self.bad.copy_(torch.maximum(self.bad, (~loss.isfinite()).to(self.bad.dtype)))
        if self.bad.device.type == "cpu":
            self.look()

    def look(self) -> None:
        """Wait for the device and see whether a loss was not finite; call before anything is logged.

        Raises:
            InputError: one was.
        """
        if not self.bad.item():
            return
        found = ((s, n, v.item()) for s in self.steps for n, v in s.losses.items() if not math.isfinite(v.item()))
        step, name, value = next(found)
        self._stop(step, name, f"{name} is {value}, and no update was made with it")

    def before_saving(self) -> None:
        """:meth:`look`, and see that what is about to be saved is finite: a finite loss may have gradients that are not.

        Raises:
            InputError: a loss, a weight or a buffer is not finite.
        """
        self.look()
        for name, network in self.networks.items():
            values = [v.isfinite().all() for v in network.state_dict().values() if v.is_floating_point()]
            if not torch.stack(values).all():
                self._stop(
                    self.steps[-1], f"weights of {name}", f"the weights of {name} are not finite, and were not saved"
                )

    def _stop(self, step: _Step, name: str, why: str) -> NoReturn:
        if self.run.ranks.is_first:
            self._write(step, name)
        raise InputError(
            f"training stopped at step {step.number}: {why}; {self.path} says what is known; "
            f"{self.run.remedy(*self.changes)}."
        )

    def _write(self, step: _Step, name: str) -> None:
        losses = [{"step": s.number} | {n: v.item() for n, v in s.losses.items()} for s in self.steps]
        report = {
            "step": step.number,
            "loss": name,
            "images": None if step.index is None else step.index.tolist(),
            "last_losses": losses,
            "norms": {name: block_norms(network) for name, network in self.networks.items()},
        }
        write_json(self.path, _plain(report))


def block_norms(network: nn.Module) -> dict[str, dict[str, float | None]]:
    """Norms of the weights and of their gradients (None: there are none) by block, ``style``, ``convs.0``, ..."""
    blocks: dict[str, list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        first, second = (name.split(".") + [""])[:2]
        blocks.setdefault(f"{first}.{second}" if second.isdigit() else first, []).append(parameter)
    return {name: {"weights": _norm(ps), "gradients": _norm([p.grad for p in ps])} for name, ps in blocks.items()}


def _norm(tensors: list[Any]) -> float | None:
    there = [t.detach().double().norm() for t in tensors if t is not None]
    return torch.stack(there).norm().item() if there else None


def _plain(value: Any) -> Any:
    """JSON has no NaN: such numbers as words."""
    return json.loads(json.dumps(value), parse_constant=str)
