"""Networks in formats that run where this package is not: torch.export programs and ONNX files (docs/export.md).

A graph holds the plain-PyTorch form of every op, for other runtimes have no kernels of ours. Each file is read back,
run at several batch sizes and compared with the network it was made from before it takes its name.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sage_fast._native import without_kernels
from sage_fast.data.writers import prepare_output, write_json
from sage_fast.errors import InputError
from sage_fast.models.checkpoints import source_of
from sage_fast.models.hyperstyle import HyperStyle
from sage_fast.models.image_encoder import ImageEncoder
from sage_fast.models.stylegan2 import Generator
from sage_fast.models.weights import load_bundle, load_encoder, load_generator

__all__ = ["TOLERANCE", "ExportConfig", "Graph", "export", "export_graph", "graphs_of"]

#: largest difference that a file may have from its network, as a share of the network's largest value where that is
#: above 1: an eighth of one step of an eight-bit image
TOLERANCE = 1e-3
_ENDINGS = {"onnx": ".onnx", "torch-export": ".pt2"}
_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_BATCHES = (1, 2, 5)  # that a file is checked with; the graph is captured at 2
StrPath = str | os.PathLike[str]


@dataclass(frozen=True)
class ExportConfig:
    """Settings of :func:`export`."""

    to: Literal["onnx", "torch-export"] = "onnx"  # for ONNX Runtime and its like, or for torch.export.load
    parts: Literal["all", "generator", "encoder"] = "all"  # mapping and synthesis, the encoder, or all that there is
    #: of the synthesis, the stored maps or none; None: as the encoder was trained, or const for a generator alone
    noise: Literal["const", "none"] | None = None

    def __post_init__(self) -> None:
        for name, choices in (("to", tuple(_ENDINGS)), ("parts", ("all", "generator", "encoder"))):
            if getattr(self, name) not in choices:
                raise InputError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}.")
        if self.noise not in (None, "const", "none"):
            raise InputError(f"noise must be 'const' or 'none', got {self.noise!r}.")


@dataclass(frozen=True, eq=False)
class Graph:
    """One network to be written.

    Attributes:
        name: stem of the file.
        module: tensors in, one tensor out; dimension 0 of each is the batch, of any size.
        inputs: name -> shape [N, ...] without N.
        output: name of the result.
        example: inputs for a batch of N, of the kind the network is made for.
    """

    name: str
    module: nn.Module
    inputs: dict[str, tuple[int, ...]]
    output: str
    example: Callable[[int], tuple[Tensor, ...]]


def export(source: StrPath | None, out: StrPath, config: ExportConfig = ExportConfig()) -> dict[str, Any]:
    """Write the networks of ``source`` into the folder ``out``: mapping, synthesis, encoder, and ``export.json``.

    Args:
        source: run folder, bundle, or a file of any published format; None: the model that comes with the package.
        out: new or empty folder.

    Returns:
        What ``export.json`` says: inputs, output, shapes, largest difference from the network and tolerance of each file.

    Raises:
        InputError: the source cannot be read, its encoder has no graph, a package is missing, or a file differs from
            its network by more than :data:`TOLERANCE`; no file is left then.
    """
    _check_packages(config.to)
    generator, encoder, noise = _load(source, config)
    graphs = graphs_of(generator, encoder, noise)
    if config.parts != "all":
        graphs = [graph for graph in graphs if (graph.name == "encoder") == (config.parts == "encoder")]
    out = prepare_output(out, offers=())
    about: dict[str, Any] = {"format": config.to, "noise": noise, "resolution": generator.resolution}
    about |= {"n_channels": generator.n_channels, "n_latent": generator.n_latent, "style_dim": generator.style_dim}
    about |= {"latent_avg": generator.latent_avg.tolist(), "tolerance": TOLERANCE, "files": {}}
    with tempfile.TemporaryDirectory(dir=out, prefix=".export-") as folder:
        for graph in graphs:
            path = Path(folder) / (graph.name + _ENDINGS[config.to])
            about["files"][path.name] = export_graph(graph, path, config.to)
        for name in about["files"]:
            os.replace(Path(folder) / name, out / name)
    write_json(out / "export.json", about)
    return about


def graphs_of(generator: Generator, encoder: ImageEncoder | None = None, noise: str = "const") -> list[Graph]:
    """What can be written of a generator in eval mode on the CPU, and of its encoder where one is given.

    ``mapping``: z [N, D] (and c [N, c_dim], one-hot) -> w [N, D]. ``synthesis``: w_plus [N, L, D] -> images [N, C, R, R],
    nominally in [-1, 1]. ``encoder``: images -> w_plus, ``latent_avg`` included, so that it may go into ``synthesis`` as it
    is; ReStyle's iterations, and the generator they take, are in the graph.

    Raises:
        InputError: a HyperStyle encoder, whose images need weights of their own.
    """
    z_dim, c_dim = generator.style.z_dim, generator.c_dim
    size = (generator.n_channels, generator.resolution, generator.resolution)

    def prior(n: int) -> tuple[Tensor, ...]:
        z = torch.randn(n, z_dim, generator=torch.Generator().manual_seed(n))
        return (z, nn.functional.one_hot(torch.arange(n) % c_dim, c_dim).float()) if c_dim else (z,)

    def latents(n: int) -> tuple[Tensor, ...]:
        return (generator.broadcast(generator.mapping(*prior(n))).contiguous(),)

    def images(n: int) -> tuple[Tensor, ...]:
        return (generator.synthesis(latents(n)[0], noise="none").clamp(-1, 1),)

    given: dict[str, tuple[int, ...]] = {"z": (z_dim,), "c": (c_dim,)} if c_dim else {"z": (z_dim,)}
    layers = (generator.n_latent, generator.style_dim)
    graphs = [
        Graph("mapping", _Mapping(generator), given, "w", prior),
        Graph("synthesis", _Synthesis(generator, noise), {"w_plus": layers}, "images", latents),
    ]
    if isinstance(encoder, HyperStyle):
        raise InputError(
            "a HyperStyle encoder changes the generator's weights for each image, which a graph of its own cannot; export "
            "the generator alone (--parts generator)."
        )
    if encoder is not None:
        graphs.append(Graph("encoder", _Encoder(encoder, generator, noise), {"images": size}, "w_plus", images))
    return graphs


@torch.no_grad()
def export_graph(graph: Graph, path: Path, to: str) -> dict[str, Any]:
    """Write one graph to ``path``, read it back and compare it with its network.

    Returns:
        inputs, output, ``largest_difference`` (absolute) and ``batches`` it was compared at.

    Raises:
        InputError: it differs by more than :data:`TOLERANCE`; the file is deleted.
    """
    with without_kernels(), _quiet():
        batch = torch.export.Dim("batch")
        shapes = tuple({0: batch} for _ in graph.inputs)
        program = torch.export.export(graph.module, graph.example(2), dynamic_shapes=shapes, strict=True)
        _forget_sources(program)
        run = _write_onnx(graph, program, path) if to == "onnx" else _write_program(program, path)
    worst = 0.0
    for n in _BATCHES:
        inputs = graph.example(n)
        wanted, got = graph.module(*inputs), run(*inputs)
        difference = float((wanted - got).abs().max())
        if got.shape != wanted.shape or not difference <= TOLERANCE * max(1.0, float(wanted.abs().max())):
            path.unlink()
            raise InputError(
                f"the exported {graph.name} differs from the network by {difference:.2g} with a batch of {n}, more than "
                f"{TOLERANCE:g}; nothing was written, export with another version of torch or of the ONNX packages."
            )
        worst = max(worst, difference)
    inputs_as_said = {name: ["batch", *shape] for name, shape in graph.inputs.items()}
    output = {graph.output: ["batch", *wanted.shape[1:]]}
    return {"inputs": inputs_as_said, "output": output, "largest_difference": worst, "batches": list(_BATCHES)}


def _forget_sources(program: torch.export.ExportedProgram) -> None:
    """Leave out which line of which file each node came from: paths of this machine, as long as the small weights."""
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)


def _write_program(program: torch.export.ExportedProgram, path: Path) -> Callable[..., Tensor]:
    torch.export.save(program, path)
    return torch.export.load(path).module()


def _write_onnx(graph: Graph, program: torch.export.ExportedProgram, path: Path) -> Callable[..., Tensor]:
    import onnxruntime

    names = list(graph.inputs)
    axes: Any = ({0: "batch"},) * len(names)
    written = torch.onnx.export(
        program, input_names=names, output_names=[graph.output], dynamic_shapes=axes, dynamo=True, verbose=False
    )
    assert written is not None
    written.save(str(path))
    engine = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(*inputs: Tensor) -> Tensor:
        return torch.from_numpy(engine.run(None, {n: x.numpy() for n, x in zip(names, inputs)})[0])

    return run


class _Mapping(nn.Module):
    def __init__(self, generator: Generator) -> None:
        super().__init__()
        self.style = generator.style

    def forward(self, z: Tensor, c: Tensor | None = None) -> Tensor:
        return self.style(z, c)


class _Synthesis(nn.Module):
    def __init__(self, generator: Generator, noise: Any) -> None:
        super().__init__()
        self.generator, self.noise = generator, noise

    def forward(self, w_plus: Tensor) -> Tensor:
        return self.generator.synthesis(w_plus, noise=self.noise)


class _Encoder(nn.Module):
    def __init__(self, encoder: ImageEncoder, generator: Generator, noise: str) -> None:
        super().__init__()
        self.encoder, self.generator, self.noise = encoder, generator, noise

    def forward(self, images: Tensor) -> Tensor:
        return self.encoder.invert(images, self.generator, self.noise).offsets + self.generator.latent_avg


def _load(source: StrPath | None, config: ExportConfig) -> tuple[Generator, ImageEncoder | None, str]:
    """Generator, the encoder where it is asked for and there is one, and the noise."""
    source = None if source is None else source_of(source)
    if source is None or source.is_dir():
        bundle = load_bundle(source)
        encoder: ImageEncoder | None = bundle.encoder if config.parts != "generator" else None
        return bundle.generator, encoder, config.noise or bundle.noise
    encoder = None
    if config.parts != "generator":
        try:
            encoder = load_encoder(source)
        except InputError:
            if config.parts == "encoder":
                raise
    return load_generator(source), encoder, config.noise or ("const" if encoder is None else "none")


def _check_packages(to: str) -> None:
    for name in _ONNX_PACKAGES if to == "onnx" else ():
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise InputError(
                f"exporting to ONNX needs the package {name}; pip install 'sage_fast[export]', or give --to torch-export."
            ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks about packages and constants that these graphs do not touch."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
