"""The arithmetic that images are drawn in: set, recorded, kept by whoever goes on, and the same in every part of a run."""

from __future__ import annotations

import json
import warnings

import pytest
import torch

from sage_fast import arithmetic
from sage_fast._native import has_bf16_products
from sage_fast.errors import InputError, SageFastWarning
from sage_fast.generation import GenerateConfig, generate
from sage_fast.generation.probing import estimate, preview
from sage_fast.generation.regenerating import regenerate
from sage_fast.generation.verifying import verify
from sage_fast.models.inference import wanted_dtype
from sage_fast.models.stylegan2 import Generator
from sage_fast.pipeline import FewShotPipeline

LOW = {"precision": "bfloat16"}


@pytest.fixture
def emulated_bfloat16(monkeypatch):
    monkeypatch.setattr(arithmetic, "multiplies_bfloat16", lambda device_type: False)


def lines(out):
    return [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]


def test_a_synthesis_in_bfloat16(tiny_bundle, multiplied_bfloat16, monkeypatch):
    pipelines = [FewShotPipeline.from_bundle(tiny_bundle, precision=name) for name in ("float32", "bfloat16")]
    assert [pipeline.precision for pipeline in pipelines] == ["float32", "bfloat16"]
    asked, forward = [], Generator.forward

    def look(generator, *arguments, **options):
        asked.append(wanted_dtype(torch.device("cpu")) if has_bf16_products() else torch.is_autocast_enabled("cpu"))
        return forward(generator, *arguments, **options)

    monkeypatch.setattr(Generator, "forward", look)
    w_plus = torch.randn(3, pipelines[0].generator.n_latent, pipelines[0].generator.style_dim)
    exact, rounded = (pipeline.synthesize(w_plus) for pipeline in pipelines)
    assert asked == ([torch.float32, torch.bfloat16] if has_bf16_products() else [False, True])
    assert rounded.dtype == torch.float32 and (exact - rounded).abs().max() < 0.05
    assert not torch.is_autocast_enabled("cpu")


def test_latents_are_float32s(tiny_bundle, multiplied_bfloat16):
    shots = torch.rand(2, 3, 8, 8) * 2 - 1
    high, low = FewShotPipeline.from_bundle(tiny_bundle), FewShotPipeline.from_bundle(tiny_bundle, **LOW)
    assert torch.equal(high.embed(shots), low.embed(shots))
    assert torch.equal(high(shots, 3).w_plus, low(shots, 3).w_plus)


def test_a_run_in_bfloat16(tiny_bundle, tiny_shots, tmp_path, multiplied_bfloat16):
    config = GenerateConfig(n=3, **LOW)
    generate(tiny_bundle, tiny_shots, tmp_path / "low", config)
    assert all(line["precision"] == "bfloat16" for line in lines(tmp_path / "low"))
    assert json.loads((tmp_path / "low" / "config.json").read_text())["precision"] == "bfloat16"
    assert verify(tmp_path / "low").problems == []
    assert regenerate(tmp_path / "low" / "manifest.jsonl", 4, tmp_path / "4.png", tiny_bundle).same
    generate(tiny_bundle, tiny_shots, tmp_path / "high", GenerateConfig(n=3))
    assert all("precision" not in line for line in lines(tmp_path / "high"))
    for out, other in (("low", GenerateConfig(n=3, resume=True)), ("high", GenerateConfig(n=3, resume=True, **LOW))):
        with pytest.raises(InputError, match="precision was '.*', is '.*'"):
            generate(tiny_bundle, tiny_shots, tmp_path / out, other)


def test_images_of_another_arithmetic_made_again(tiny_bundle, tiny_shots, tmp_path, monkeypatch, multiplied_bfloat16):
    generate(tiny_bundle, tiny_shots, tmp_path / "out", GenerateConfig(n=1))
    manifest, settings = tmp_path / "out" / "manifest.jsonl", json.loads((tmp_path / "out" / "config.json").read_text())
    line = lines(tmp_path / "out")[0]
    last = {name: line.pop(name) for name in ("similar", "model", "version") if name in line}
    manifest.write_text(json.dumps(line | {"sha256": "0" * 64, "precision": "tf32"} | last) + "\n")
    (tmp_path / "out" / "config.json").write_text(json.dumps(settings | {"precision": "tf32"}))
    (tmp_path / "kept.jsonl").write_bytes(manifest.read_bytes())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for file in (manifest, tmp_path / "kept.jsonl"):
        made = regenerate(file, 0, tmp_path / "0.png", tiny_bundle, tiny_shots)
        assert not made.same and "precision" in made.other
    low = tmp_path / "low"
    generate(tiny_bundle, tiny_shots, low, GenerateConfig(n=1, **LOW))
    monkeypatch.setattr(arithmetic, "multiplies_bfloat16", lambda device_type: False)
    with pytest.warns(SageFastWarning, match="does not multiply bfloat16"):
        made = regenerate(low / "manifest.jsonl", 0, tmp_path / "1.png", tiny_bundle)
    assert made.same or made.other == ["precision"]


def test_float32_where_bfloat16_is_not_multiplied(tiny_bundle, tiny_shots, tmp_path, emulated_bfloat16):
    with pytest.warns(SageFastWarning, match="this processor does not multiply bfloat16") as caught:
        generate(tiny_bundle, tiny_shots, tmp_path / "low", GenerateConfig(n=2, **LOW))
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(tiny_bundle, tiny_shots, tmp_path / "high", GenerateConfig(n=2))
    assert lines(tmp_path / "low") == lines(tmp_path / "high")
    pipeline = FewShotPipeline.from_bundle(tiny_bundle)
    generate(pipeline, tiny_shots, tmp_path / "low", GenerateConfig(n=2, resume=True, **LOW))  # is what it computes in


def test_settings_that_cannot_be(tiny_bundle, tiny_shots, tmp_path):
    with pytest.raises(InputError, match="precision must be one of float32, tf32, bfloat16, got 'float16'"):
        GenerateConfig(precision="float16")
    with pytest.raises(InputError, match="inversion_device must be one of cpu, model, got 'cuda'"):
        GenerateConfig(inversion_device="cuda")
    for name, value, said in (
        ("precision", "int8", "precision must be one of float32, tf32, bfloat16, got 'int8'"),
        ("precision", "tf32", "precision 'tf32' is one of GPUs, and the model is on cpu; take 'float32'"),
        ("inversion_device", "cuda", "inversion_device must be one of cpu, model, got 'cuda'"),
    ):
        with pytest.raises(InputError, match=said):
            FewShotPipeline.from_bundle(tiny_bundle, **{name: value})
    pipeline = FewShotPipeline.from_bundle(tiny_bundle)
    pipeline.precision = "bfloat16"
    with pytest.raises(InputError, match="the pipeline has precision 'bfloat16' and the config 'float32'"):
        generate(pipeline, tiny_shots, tmp_path / "out", GenerateConfig(n=1))
    assert not (tmp_path / "out").exists()


def test_an_output_of_before_goes_on(tiny_bundle, tiny_shots, tmp_path):
    generate(tiny_bundle, tiny_shots, tmp_path / "out", GenerateConfig(n=2))
    recorded = json.loads((tmp_path / "out" / "config.json").read_text())
    assert recorded.pop("precision") == "float32" and recorded.pop("inversion_device") == "cpu"
    (tmp_path / "out" / "config.json").write_text(json.dumps(recorded))
    (tmp_path / "out" / "SHA256SUMS").unlink()  # older still, so that the altered file is not found out
    for device in ("cpu", "model"):  # the same on a CPU
        config = GenerateConfig(n=3, resume=True, inversion_device=device)
        assert generate(tiny_bundle, tiny_shots, tmp_path / "out", config).n_new == (6 if device == "cpu" else 0)
    assert verify(tmp_path / "out").problems == []


def test_products_of_float32_during_a_run(tiny_bundle, tiny_shots, tmp_path, monkeypatch):
    before, seen = arithmetic._read_products(), set()
    torch.set_float32_matmul_precision("medium")
    synthesize = FewShotPipeline.synthesize

    def look(pipeline, w_plus):
        seen.add((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
        return synthesize(pipeline, w_plus)

    monkeypatch.setattr(FewShotPipeline, "synthesize", look)
    try:
        config = GenerateConfig(n=2)
        generate(tiny_bundle, tiny_shots, tmp_path / "out", config)
        regenerate(tmp_path / "out" / "manifest.jsonl", 0, tmp_path / "0.png", tiny_bundle)
        preview(tiny_bundle, tiny_shots, tmp_path / "preview.png", config)
        estimate(tiny_bundle, tiny_shots, config)
        assert torch.get_float32_matmul_precision() == "medium" and torch.backends.cudnn.allow_tf32 == before.cudnn
    finally:
        arithmetic._write_products(before)
    assert seen == {("highest", False)}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_latents_and_images_of_cuda(tiny_bundle, tiny_shots, tmp_path):
    shots = torch.rand(2, 3, 8, 8) * 2 - 1
    here = FewShotPipeline.from_bundle(tiny_bundle)
    there = FewShotPipeline.from_bundle(tiny_bundle, "cuda")
    assert torch.equal(here.embed(shots), there.embed(shots))
    with arithmetic.float32_products():
        a, b = here(shots, 64), there(shots, 64)
    assert torch.equal(a.w_plus, b.w_plus)
    apart = ((a.images - b.images).abs() * 127.5).round()
    assert apart.max() <= 1 and (apart > 0).float().mean() <= 1e-3
    config = GenerateConfig(n=3, device="cuda", precision="tf32", inversion_device="model")
    generate(tiny_bundle, tiny_shots, tmp_path / "out", config)
    assert verify(tmp_path / "out").problems == []
