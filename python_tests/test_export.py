"""Networks as torch.export programs and ONNX files: read back by their own runtimes and compared with the originals."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from tiny_model import RESOLUTION, STYLE_DIM, tiny_encoder, tiny_networks

from sage_fast import export as export_module
from sage_fast._native import has_kernel, without_kernels
from sage_fast.cli import main
from sage_fast.errors import InputError
from sage_fast.export import TOLERANCE, ExportConfig, export, export_graph, graphs_of
from sage_fast.models.stylegan2 import Generator
from sage_fast.models.weights import load_bundle

GENERATOR, ENCODER, _ = tiny_networks()


def needs_onnx():
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed (extra 'export')")


def randomised(**settings) -> Generator:
    """A generator whose noise and biases are not zero, as those of a trained one."""
    with torch.random.fork_rng():
        torch.manual_seed(8)
        generator = Generator(RESOLUTION, STYLE_DIM, n_mapping=2, channel_base=64, channel_max=8, **settings)
        with torch.no_grad():
            for name, value in generator.named_parameters():
                if name.endswith(("noise.weight", "bias")):
                    value.add_(0.3 * torch.randn_like(value))
    return generator.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def onnx_folder(tiny_bundle, tmp_path_factory):
    needs_onnx()
    folder = tmp_path_factory.mktemp("onnx") / "out"
    assert main(["export", str(tiny_bundle), "--to", "onnx", "--out", str(folder)]) == 0
    return folder


def run_onnx(path, **inputs):
    import onnxruntime

    engine = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(engine.run(None, {k: v.detach().numpy() for k, v in inputs.items()})[0])


def test_the_files_of_a_bundle_chain_from_prior_and_from_images_to_images(onnx_folder, tiny_bundle):
    bundle, z = load_bundle(tiny_bundle), torch.randn(7, STYLE_DIM)
    with torch.no_grad():
        w = bundle.generator.mapping(z)
        images = bundle.generator(w, noise=bundle.noise)
        again = bundle.encoder(images) + bundle.generator.latent_avg
    assert torch.allclose(run_onnx(onnx_folder / "mapping.onnx", z=z), w, atol=1e-5)
    w_plus = bundle.generator.broadcast(w)
    assert torch.allclose(run_onnx(onnx_folder / "synthesis.onnx", w_plus=w_plus), images, atol=1e-5)
    encoded = run_onnx(onnx_folder / "encoder.onnx", images=images)
    assert torch.allclose(encoded, again, atol=1e-5)
    assert run_onnx(onnx_folder / "synthesis.onnx", w_plus=encoded).shape == images.shape


def test_the_folder_says_what_it_holds(onnx_folder, tiny_bundle):
    about = json.loads((onnx_folder / "export.json").read_text())
    assert sorted(about["files"]) == ["encoder.onnx", "mapping.onnx", "synthesis.onnx"]
    assert about["files"]["synthesis.onnx"]["inputs"] == {"w_plus": ["batch", 4, STYLE_DIM]}
    assert about["files"]["synthesis.onnx"]["output"] == {"images": ["batch", 3, RESOLUTION, RESOLUTION]}
    assert about["files"]["encoder.onnx"]["batches"] == [1, 2, 5]
    assert all(0 <= f["largest_difference"] <= TOLERANCE for f in about["files"].values())
    assert np.allclose(about["latent_avg"], load_bundle(tiny_bundle).generator.latent_avg)
    names = {path.name for path in onnx_folder.iterdir() if not path.name.startswith(".")}
    assert names == {"encoder.onnx", "export.json", "mapping.onnx", "synthesis.onnx"}


def test_names_shapes_and_no_path_of_this_machine_are_in_the_files(onnx_folder):
    import onnx

    model = onnx.load(onnx_folder / "synthesis.onnx")
    onnx.checker.check_model(model, full_check=True)
    (w_plus,), (images,) = model.graph.input, model.graph.output
    assert (w_plus.name, images.name) == ("w_plus", "images")
    assert [d.dim_param or d.dim_value for d in w_plus.type.tensor_type.shape.dim] == ["batch", 4, STYLE_DIM]
    assert {node.domain for node in model.graph.node} == {""}
    assert str(export_module.__file__).rpartition("/")[0].encode() not in (onnx_folder / "synthesis.onnx").read_bytes()


@pytest.mark.parametrize("connections", ["skip", "resnet", "orig"])
def test_every_architecture_becomes_onnx(tmp_path, connections):
    needs_onnx()
    clamp = 0.8 if connections == "orig" else None
    generator = randomised(connections=connections, clamp=clamp)
    graph = graphs_of(generator, noise="const")[1]
    said = export_graph(graph, tmp_path / "g.onnx", "onnx")
    (w_plus,) = graph.example(3)
    assert torch.allclose(run_onnx(tmp_path / "g.onnx", w_plus=w_plus), graph.module(w_plus), atol=1e-4)
    assert said["largest_difference"] < 1e-4
    assert (
        graph.module(w_plus) - generator(w_plus, noise="none")
    ).abs().max() > 0.01  # the stored noise is in the graph


def test_a_conditional_generator_takes_labels(tmp_path):
    needs_onnx()
    generator = randomised(c_dim=3)
    graph = graphs_of(generator)[0]
    assert export_graph(graph, tmp_path / "m.onnx", "onnx")["inputs"] == {
        "z": ["batch", STYLE_DIM],
        "c": ["batch", 3],
    }
    z, c = torch.randn(4, STYLE_DIM), torch.eye(3)[[2, 0, 1, 1]]
    assert torch.allclose(run_onnx(tmp_path / "m.onnx", z=z, c=c), generator.mapping(z, c), atol=1e-5)


def test_the_iterations_of_restyle_are_in_the_graph(tmp_path):
    encoder = tiny_encoder("restyle", GENERATOR)
    graph = graphs_of(GENERATOR, encoder, "none")[2]
    export_graph(graph, tmp_path / "e.pt2", "torch-export")
    (images,) = graph.example(3)
    wanted = encoder.invert(images, GENERATOR).offsets + GENERATOR.latent_avg
    assert torch.allclose(torch.export.load(tmp_path / "e.pt2").module()(images), wanted, atol=1e-4)


def test_a_hyperstyle_encoder_is_refused_with_the_remedy():
    with pytest.raises(InputError, match=r"weights for each image.*--parts generator"):
        graphs_of(GENERATOR, tiny_encoder("hyperstyle", GENERATOR))


def test_a_program_runs_where_this_package_is_not(tiny_bundle, tmp_path):
    out = tmp_path / "out"
    about = export(tiny_bundle, out, ExportConfig(to="torch-export", parts="generator"))
    assert sorted(about["files"]) == ["mapping.pt2", "synthesis.pt2"]
    code = f"""
import sys, torch
sys.modules["sage_fast"] = None
g = torch.export.load({str(out / "mapping.pt2")!r}).module(), torch.export.load({str(out / "synthesis.pt2")!r}).module()
z = torch.randn(4, {STYLE_DIM}, generator=torch.Generator().manual_seed(1))
torch.save(g[1](g[0](z)[:, None].repeat(1, 4, 1)), {str(tmp_path / "images.pt")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    z = torch.randn(4, STYLE_DIM, generator=torch.Generator().manual_seed(1))
    bundle = load_bundle(tiny_bundle)
    wanted = bundle.generator(bundle.generator.mapping(z), noise=bundle.noise)
    assert torch.allclose(torch.load(tmp_path / "images.pt"), wanted, atol=1e-5)


def test_the_command_says_what_it_wrote_and_how_near_it_is(tiny_bundle, tmp_path, capsys):
    words = ["export", str(tiny_bundle), "--to", "torch-export", "--parts", "encoder", "--out", str(tmp_path / "out")]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "encoder.pt2: images [batch, 3, 8, 8] -> w_plus [batch, 4, 16]" in said
    assert "largest difference" in said and "tolerance 0.001" in said
    assert main(words) == 2
    assert "is not empty; give another folder." in capsys.readouterr().err


def test_a_file_that_differs_is_not_left(tmp_path, monkeypatch, tiny_bundle):
    monkeypatch.setattr(export_module, "TOLERANCE", -1.0)
    with pytest.raises(InputError, match=r"the exported mapping differs .* batch of 1, more than -1; nothing was"):
        export(tiny_bundle, tmp_path / "out", ExportConfig(to="torch-export"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".sage_fast.json"]


def test_without_the_packages_the_extra_is_named(tmp_path, monkeypatch, capsys, tiny_bundle):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.setitem(sys.modules, "onnx", sys)
    assert main(["export", str(tiny_bundle), "--out", str(tmp_path / "out")]) == 2
    assert "needs the package onnxscript; pip install 'sage_fast[export]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_generators_file_gives_a_generator_and_no_encoder(tmp_path, tiny_bundle):
    small = Generator(4, STYLE_DIM, n_mapping=1, channel_base=64, channel_max=8)
    torch.save({"g_ema": small.state_dict(), "latent_avg": small.latent_avg}, tmp_path / "g.pt")
    about = export(tmp_path / "g.pt", tmp_path / "out", ExportConfig(to="torch-export"))
    assert sorted(about["files"]) == ["mapping.pt2", "synthesis.pt2"] and about["noise"] == "const"
    with pytest.raises(InputError, match="encoder"):
        export(tmp_path / "g.pt", tmp_path / "other", ExportConfig(to="torch-export", parts="encoder"))


def test_kernels_are_off_inside_and_back_after():
    before = has_kernel("bias_act", "cpu")
    with without_kernels():
        assert not has_kernel("bias_act", "cpu")
    assert has_kernel("bias_act", "cpu") == before


@pytest.mark.parametrize("settings", [{"to": "tflite"}, {"parts": "decoder"}, {"noise": "random"}])
def test_settings_are_checked(settings):
    with pytest.raises(InputError, match="must be"):
        ExportConfig(**settings)
