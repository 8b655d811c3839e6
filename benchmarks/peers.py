"""Other people's StyleGAN2, from local clones (``--peer-path``), with the weights of one of our generators.

A clone of NVlabs/stylegan2-ada-pytorch ("ada"), NVlabs/stylegan3 ("sg3", its StyleGAN2 networks) or
rosinality/stylegan2-pytorch ("ros") is recognised by its files. Their code runs in this process: on its CPU roads, or, for a
generator on a GPU, NVlabs' as they publish it, in float16 at the four largest sizes.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.utils import cpp_extension

from sage_fast.models.discriminator import Discriminator
from sage_fast.models.stylegan2 import Generator

Draw = Callable[[Tensor], Tensor]
#: what their files import and the CPU roads do not need
_MISSING_TODAY = {
    "requests": types.SimpleNamespace(),
    "pkg_resources": types.SimpleNamespace(parse_version=lambda text: tuple(int(n) for n in text.split(".")[:2])),
}


@functools.cache
def _imported_once_built() -> None:
    """NVlabs' code imports by name what it has built, which PyTorch's ``load`` no longer leaves where ``import`` looks."""
    load = cpp_extension.load

    @functools.wraps(load)
    def loaded(name: str, *args: object, **settings: object) -> types.ModuleType:
        module = sys.modules[name] = load(name, *args, **settings)  # type: ignore[arg-type]
        return module

    cpp_extension.load = loaded  # type: ignore[assignment]


def load_peers(paths: list[str], generator: Generator) -> dict[str, Draw]:
    """name -> function from w_plus [N, L, D] to images, for each clone."""
    return dict(_load(Path(path), generator) for path in paths)


def load_trainers(
    paths: list[str], generator: Generator, discriminator: Discriminator
) -> dict[str, tuple[torch.nn.Module, Draw, torch.nn.Module, Draw]]:
    """name -> (network, its synthesis, discriminator, its logits) with our weights, for each clone by NVlabs.

    On the device of ``generator``: on a GPU as published, in float16 at the four largest sizes, on a CPU in float32.
    """
    found, device = {}, generator.latent_avg.device
    fp32 = device.type == "cpu"
    for path in map(Path, paths):
        for name, module in (("sg3", "training.networks_stylegan2"), ("ada", "training.networks")):
            if (path / (module.replace(".", "/") + ".py")).exists():
                net, D = (one.to(device) for one in _nvlabs_networks(path, module, generator, discriminator))
                found[name] = (
                    net,
                    lambda w, net=net: net(w, noise_mode="const", force_fp32=fp32),
                    D,
                    lambda x, D=D: D(x, None, force_fp32=fp32),
                )
                break
    return found


def load_augment_pipes(paths: list[str], p: float) -> dict[str, torch.nn.Module]:
    """name -> the ADA pipeline "bgc" at that p, for each clone by NVlabs."""
    parts = "xflip rotate90 xint scale rotate aniso xfrac brightness contrast lumaflip hue saturation".split()
    pipes = {}
    for path in map(Path, paths):
        if (path / "training" / "augment.py").exists():
            with _imports_from(path):
                module = importlib.import_module("training.augment")
                pipe = module.AugmentPipe(**dict.fromkeys(parts, 1))
            pipe.p.fill_(p)
            pipes["sg3" if (path / "training" / "networks_stylegan3.py").exists() else "ada"] = pipe
    return pipes


def _load(path: Path, generator: Generator) -> tuple[str, Draw]:
    if (path / "training" / "networks_stylegan2.py").exists():
        return "sg3", _nvlabs(path, "training.networks_stylegan2", generator)
    if (path / "training" / "networks.py").exists():
        return "ada", _nvlabs(path, "training.networks", generator)
    if (path / "op" / "fused_act.py").exists() and generator.latent_avg.device.type == "cpu":
        return "ros", _rosinality(path, generator)
    raise SystemExit(
        f"--peer-path: {path} is no clone of stylegan2-ada-pytorch, stylegan3 or, on a CPU, rosinality's port"
    )


@contextmanager
def _imports_from(path: Path) -> Iterator[None]:
    """The clone's top-level names for the time of the import; two clones use the same ones."""
    _imported_once_built()
    names = ("training", "torch_utils", "dnnlib", "op", "model", "distributed")
    for name, stand_in in _MISSING_TODAY.items():
        if name not in sys.modules and importlib.util.find_spec(name) is None:
            sys.modules[name] = stand_in  # type: ignore[assignment]
    sys.path.insert(0, str(path))
    try:
        yield
    finally:
        sys.path.remove(str(path))
        for name in [n for n in sys.modules if n.split(".")[0] in names]:
            del sys.modules[name]


def _nvlabs(path: Path, module: str, generator: Generator) -> Draw:
    net, _ = _nvlabs_networks(path, module, generator)
    device = generator.latent_avg.device
    net.eval().requires_grad_(False).to(device)
    return lambda w_plus: net(w_plus, noise_mode="const", force_fp32=device.type == "cpu")


def _nvlabs_networks(
    path: Path, module: str, generator: Generator, discriminator: Discriminator | None = None
) -> tuple[torch.nn.Module, torch.nn.Module]:
    sizes = dict(zip((4 << i for i in range(9)), generator.channels))
    init = dict(
        img_resolution=generator.resolution,
        img_channels=generator.n_channels,
        channel_base=max(size * c for size, c in sizes.items()),
        channel_max=max(generator.channels),
        num_fp16_res=0 if generator.latent_avg.device.type == "cpu" else 4,
        conv_clamp=None if generator.latent_avg.device.type == "cpu" else 256,  # as their train.py asks with float16
    )
    with _imports_from(path):
        networks = importlib.import_module(module)
        net = networks.SynthesisNetwork(w_dim=generator.style_dim, **init)
        D = networks.Discriminator(c_dim=0, **init) if discriminator is not None else torch.nn.Identity()
    _load_state(net, _generator_state(generator))
    if discriminator is not None:
        _load_state(D, _discriminator_state(discriminator))
    return net, D


def _load_state(net: torch.nn.Module, state: dict[str, Tensor]) -> None:
    missing, unexpected = net.load_state_dict(state, strict=False)
    assert not unexpected and all("resample_filter" in key for key in missing), (missing, unexpected)


def _generator_state(generator: Generator) -> dict[str, Tensor]:
    state = {"b4.const": generator.input.input[0]}
    for i in range(len(generator.channels)):
        block = f"b{4 << i}."
        layers = [("conv1", generator.conv1)] if i == 0 else zip(("conv0", "conv1"), generator.convs[2 * i - 2 : 2 * i])
        for name, ours in layers:
            number = 0 if i == 0 else 2 * i - 1 + (name == "conv1")
            state |= {
                f"{block}{name}.weight": ours.conv.weight[0],
                f"{block}{name}.bias": ours.activate.bias,
                f"{block}{name}.noise_strength": ours.noise.weight.reshape([]),
                f"{block}{name}.affine.weight": ours.conv.modulation.weight,
                f"{block}{name}.affine.bias": ours.conv.modulation.bias,
                f"{block}{name}.noise_const": getattr(generator.noises, f"noise_{number}")[0, 0],
            }
        rgb = generator.to_rgb1 if i == 0 else generator.to_rgbs[i - 1]
        state |= {
            f"{block}torgb.weight": rgb.conv.weight[0],
            f"{block}torgb.bias": rgb.bias.flatten(),
            f"{block}torgb.affine.weight": rgb.conv.modulation.weight,
            f"{block}torgb.affine.bias": rgb.conv.modulation.bias,
        }
    return state


def _discriminator_state(D: Discriminator) -> dict[str, Tensor]:
    first, *blocks = D.convs
    state = {f"b{D.resolution}.fromrgb.weight": first[0].weight, f"b{D.resolution}.fromrgb.bias": first[1].bias}
    for i, block in enumerate(blocks):
        name = f"b{D.resolution >> i}."
        state |= {
            f"{name}conv0.weight": block.conv1[0].weight,
            f"{name}conv0.bias": block.conv1[1].bias,
            f"{name}conv1.weight": block.conv2[1].weight,
            f"{name}conv1.bias": block.conv2[2].bias,
            f"{name}skip.weight": block.skip[1].weight,
        }
    return state | {
        "b4.conv.weight": D.final_conv[0].weight,
        "b4.conv.bias": D.final_conv[1].bias,
        "b4.fc.weight": D.final_linear[0].weight,
        "b4.fc.bias": D.final_linear[0].bias,
        "b4.out.weight": D.final_linear[1].weight,
        "b4.out.bias": D.final_linear[1].bias,
    }


def _rosinality(path: Path, generator: Generator) -> Draw:
    import torch.utils.cpp_extension as extension

    load = extension.load
    extension.load = lambda *args, **kwargs: types.SimpleNamespace()  # CUDA code that the CPU road never calls
    try:
        with _imports_from(path):
            model = importlib.import_module("model")
    finally:
        extension.load = load
    init = dict(style_dim=generator.style_dim, n_mlp=generator.n_mapping)
    net = model.Generator(generator.resolution, **init)
    sizes = [4 << i for i in range(len(generator.channels))]
    if [net.channels[size] for size in sizes] != generator.channels:
        net.channels = dict(zip(sizes, generator.channels))
        _rebuild(net, model, generator)
    net.load_state_dict(generator.state_dict(), strict=False)
    net.eval().requires_grad_(False)
    return lambda w_plus: net([w_plus], input_is_latent=True, randomize_noise=False)[0]


def _rebuild(net: torch.nn.Module, model: types.ModuleType, generator: Generator) -> None:
    """Their constructor knows its own channels only: make the layers again with ours."""
    blur, dim = [1, 3, 3, 1], generator.style_dim
    c = generator.channels
    net.input = model.ConstantInput(c[0])
    net.conv1 = model.StyledConv(c[0], c[0], 3, dim, blur_kernel=blur)
    net.to_rgb1 = model.ToRGB(c[0], dim, upsample=False)
    net.convs, net.to_rgbs = torch.nn.ModuleList(), torch.nn.ModuleList()
    for a, b in zip(c, c[1:]):
        net.convs.append(model.StyledConv(a, b, 3, dim, upsample=True, blur_kernel=blur))
        net.convs.append(model.StyledConv(b, b, 3, dim, blur_kernel=blur))
        net.to_rgbs.append(model.ToRGB(b, dim))
