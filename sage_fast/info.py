"""What was built, with what, and which op runs natively on which device: the report behind ``sage-fast info``."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

__all__ = ["build_report"]


def build_report() -> dict[str, Any]:
    """A dictionary of plain values.

    ``ops`` maps op and device to ``"native"``, ``"composed"`` (of native ops and PyTorch, no kernel of its own) or
    ``"reference: <why>"``.
    """
    import torch

    import sage_fast
    from sage_fast import _build, _native

    native = _native.load()
    folder = native.folder or Path(__file__).parent
    return {
        "version": sage_fast.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "threads": torch.get_num_threads(),
        "build_mode": _native.build_mode(),
        "built": _build.read_info(folder),
        "host": _host_report(native),
        "synthesis": {device: _roads(device) for device in native.devices},
        "ops": {op: {device: _state(native, op, device) for device in ("cpu", "cuda")} for op in _all_ops()},
    }


def _roads(device: str) -> dict[str, str]:
    """Which road a generator takes for inference, under autocast and with gradients, and why."""
    import torch

    from sage_fast.arithmetic import substitution
    from sage_fast.models.inference import choose_road, wanted_dtype
    from sage_fast.models.stylegan2 import Generator

    generator = Generator(4, style_dim=1, n_mapping=1, channels=[1]).to(device)
    w_plus = torch.zeros(1, generator.n_latent, 1, device=device)
    roads = {"with gradients": "{} ({})".format(*choose_road(generator, w_plus))}
    roads["training in bfloat16"] = substitution("bfloat16", device) or "bfloat16"
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        road, reason = choose_road(generator, w_plus)
        roads["inference"] = f"{road} ({reason})"
        if road == "fused":
            products = (
                "bfloat16"
                if wanted_dtype(w_plus.device) == torch.bfloat16
                else "float32: the processor has no bfloat16 products"
            )
            roads["inference under autocast bfloat16"] = f"fused ({products})"
    if device == "cuda":
        roads["convolutions"] = _convolutions()
    return roads


def _convolutions() -> str:
    """How the fused synthesis convolves on a GPU, and what was measured in this process."""
    from sage_fast.ops.cuda_convolution import choices, mode

    ways = [choice.way for choice in choices().values()]
    measured = ", ".join(f"{way} {ways.count(way)}" for way in sorted(set(ways)))
    about = {
        "auto": "auto: cuDNN or styled_conv, whichever is faster at the first use of a layer shape",
        "cudnn": "cuDNN: SAGE_FAST_CUDA_CONV",
        "own": "styled_conv: SAGE_FAST_CUDA_CONV",
    }
    return about[mode()] + (f"; measured in this process: {measured}" if measured else "")


def _all_ops() -> list[str]:
    from sage_fast import ops

    return sorted(name for name in ops.__all__ if not name.endswith("_reference"))


def _state(native: Any, op: str, device: str) -> str:
    from sage_fast._native import CUDA_OPS, NATIVE_OPS

    if op not in NATIVE_OPS and (device != "cuda" or op not in CUDA_OPS):
        return "composed"
    if device in native.devices:
        return "native"
    return f"reference: {native.reasons.get(device, 'no kernel')}"


def _host_report(native: Any) -> dict[str, Any]:
    """The pybind11 module's own account, read from the same build as the ops."""
    host = native.host
    if host is None:
        return {"error": native.reasons["host"]} if "host" in native.reasons else {}
    functions = [name for name in _all_ops() if hasattr(host, name)]
    return {**host.build_report(), "functions": functions, "threads": host.num_threads()}
