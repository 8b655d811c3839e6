"""Files that a GPU encodes: the whole road with a stand-in for torchvision on a CPU, and the real one where there is a GPU."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from sage_fast.data.writers import read_manifest
from sage_fast.errors import InputError
from sage_fast.generation import (
    GenerateConfig,
    Prepared,
    about_images,
    draw_shard,
    format_of,
    generate,
    open_output,
    write_shard,
    writing,
)
from sage_fast.generation.encoding import choose_encoder
from sage_fast.generation.probing import estimate, preview
from sage_fast.generation.ray_data import ShardWriter, _Job
from sage_fast.generation.regenerating import regenerate
from sage_fast.generation.run import plan_of
from sage_fast.generation.verifying import verify
from sage_fast.pipeline import FewShotPipeline

CONFIG = GenerateConfig(n=11, batch=4, shard=9, workers=4, image="jpg", encoder="nvjpeg")
CPU = torch.device("cpu")
REAL = pytest.mark.skipif(
    not torch.cuda.is_available() or find_spec("torchvision") is None, reason="needs a CUDA GPU and torchvision"
)


@pytest.fixture(scope="module")
def pipeline(tiny_bundle):
    return FewShotPipeline.from_bundle(tiny_bundle)


def give(monkeypatch, encode_jpeg):
    """A torchvision of which there is ``encode_jpeg`` alone."""
    torchvision, its_io = ModuleType("torchvision"), ModuleType("torchvision.io")
    torchvision.__spec__, torchvision.__version__ = ModuleSpec("torchvision", None), "0.1+here"
    torchvision.io, its_io.encode_jpeg = its_io, encode_jpeg
    monkeypatch.setitem(sys.modules, "torchvision", torchvision)
    monkeypatch.setitem(sys.modules, "torchvision.io", its_io)


@pytest.fixture
def stand_in(monkeypatch):
    """torchvision with Pillow inside, and every device passes for a GPU; returns how many images each call had."""
    calls = []

    def encode_jpeg(images, quality=75):
        calls.append(len(images))
        files = []
        for image in images:
            assert image.dtype == torch.uint8 and image.ndim == 3 and len(image) == 3 and image.is_contiguous()
            file = io.BytesIO()
            Image.fromarray(image.permute(1, 2, 0).cpu().numpy()).save(file, "JPEG", quality=quality, subsampling=0)
            files.append(torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8))
        return files

    give(monkeypatch, encode_jpeg)
    monkeypatch.setattr("sage_fast.generation.encoding._is_gpu", lambda device: True)
    return calls


def images_of(folder):
    return {path.name: path.read_bytes() for pattern in ("*/*.jpg", "*.tar") for path in folder.glob(pattern)}


def one_sentence(error):
    text = str(error.value)
    return "\n" not in text and text.endswith(".") and ". " not in text


# --- with the stand-in ---


@pytest.mark.parametrize("format", ["folder", "webdataset"])
def test_files_are_encoded_where_they_are_drawn(pipeline, tiny_shots, tmp_path, stand_in, format):
    config = replace(CONFIG, format=format, quality=90)
    generate(pipeline, tiny_shots, tmp_path / "there", config)
    assert stand_in == [1, 4, 4, 1, 4, 4, 1, 4]  # a trial, then whole micro-batches of shards of 9, 9 and 4
    generate(pipeline, tiny_shots, tmp_path / "host", replace(config, encoder="pillow"))
    assert len(stand_in) == 8
    assert images_of(tmp_path / "there") == images_of(tmp_path / "host")
    assert json.loads((tmp_path / "there" / "config.json").read_text())["encoder"] == "nvjpeg 0.1+here"
    assert verify(tmp_path / "there").problems == []


def test_what_goes_the_same_road(pipeline, tiny_shots, tmp_path, stand_in):
    """An image again, a dry run, a preview, tar files by size, a run that is interrupted."""
    generate(pipeline, tiny_shots, tmp_path / "out", CONFIG)
    assert regenerate(tmp_path / "out" / "manifest.jsonl", 12, tmp_path / "a.jpg", pipeline).same
    line = read_manifest(tmp_path / "out" / "manifest.jsonl")[12]
    assert (tmp_path / "a.jpg").read_bytes() == (tmp_path / "out" / line["file"]).read_bytes()
    with Image.open(tmp_path / "a.jpg") as image:
        assert json.loads(image.info["comment"].decode().removeprefix("sage_fast "))["category"] == "rose"
    host = estimate(pipeline, tiny_shots, replace(CONFIG, encoder="pillow"))
    assert estimate(pipeline, tiny_shots, CONFIG).image_bytes == host.image_bytes
    assert preview(pipeline, tiny_shots, tmp_path / "sheet.png", CONFIG).exists()
    by_size = replace(CONFIG, format="webdataset", shard=None, shard_mb=0.02)
    generate(pipeline, tiny_shots, tmp_path / "tars", by_size)
    assert len(images_of(tmp_path / "tars")) > 1 and verify(tmp_path / "tars").problems == []


def test_an_interrupted_run_goes_on(pipeline, tiny_shots, tmp_path, stand_in, monkeypatch):
    draw = writing.draw_images

    def fail_late(pipeline, latents):
        if latents.positions.start >= 18:
            raise RuntimeError("out of memory")
        return draw(pipeline, latents)

    generate(pipeline, tiny_shots, tmp_path / "whole", CONFIG)
    with monkeypatch.context() as patch:
        patch.setattr(writing, "draw_images", fail_late)
        with pytest.raises(RuntimeError, match="out of memory"):
            generate(pipeline, tiny_shots, tmp_path / "out", CONFIG)
    generate(pipeline, tiny_shots, tmp_path / "out", replace(CONFIG, resume=True))
    assert images_of(tmp_path / "out") == images_of(tmp_path / "whole")


def test_other_processes_write_shards(pipeline, tiny_shots, tmp_path, stand_in):
    """Images that are on the host again, and the workers of a cluster."""
    generate(pipeline, tiny_shots, tmp_path / "run", CONFIG)
    plan = plan_of(pipeline, tiny_shots, CONFIG)
    with open_output(pipeline, plan, tmp_path / "own", CONFIG):
        target = format_of(tmp_path / "own")
        prepared = Prepared(pipeline, target.plan)
        about = about_images(prepared, target.plan.positions(0))
        write_shard(target, 0, draw_shard(pipeline, target.plan, 0, prepared), about)
        writer = ShardWriter(_Job(pipeline, str(tmp_path / "own"), CONFIG, pipeline.hash))
        done = writer({"shard": np.array([1, 2])})
        assert done["images"].tolist() == [9, 4] and set(done["error"]) == {""}
    assert images_of(tmp_path / "own") == images_of(tmp_path / "run")


def test_a_run_is_not_resumed_on_a_cpu(pipeline, tiny_shots, tmp_path, stand_in, monkeypatch):
    generate(pipeline, tiny_shots, tmp_path / "out", CONFIG)
    monkeypatch.setattr("sage_fast.generation.encoding._is_gpu", lambda device: False)
    with pytest.raises(InputError, match="needs the model on a GPU, got it on cpu; use device cuda") as error:
        generate(pipeline, tiny_shots, tmp_path / "out", replace(CONFIG, resume=True))
    assert one_sentence(error)
    with pytest.raises(InputError, match="encoder was 'nvjpeg 0.1.here', is 'pillow") as error:
        generate(pipeline, tiny_shots, tmp_path / "out", replace(CONFIG, resume=True, encoder="pillow"))
    with pytest.raises(InputError, match="needs the model on a GPU"):
        regenerate(tmp_path / "out" / "manifest.jsonl", 12, tmp_path / "a.jpg", pipeline)
    assert verify(tmp_path / "out").problems == []


def test_what_cannot_be_encoded_is_refused(monkeypatch, stand_in):
    def refused(words, *arguments):
        with pytest.raises(InputError, match=words) as error:
            choose_encoder("nvjpeg", *arguments)
        assert one_sentence(error)

    for image in ("png", "webp"):
        with pytest.raises(InputError, match=f"encoder 'nvjpeg' writes jpg alone, got image '{image}'") as error:
            GenerateConfig(image=image, encoder="nvjpeg")
        assert one_sentence(error)
        refused(f"encoder 'nvjpeg' cannot store 3 channels as {image}", image, None, 3, CPU)
    refused("encoder 'nvjpeg' cannot store 1 channel as jpg; choose", "jpg", None, 1, CPU)

    def fails(images, quality=75):
        raise RuntimeError("encode_jpegs_cuda: torchvision not compiled with nvJPEG support\nException raised from ...")

    give(monkeypatch, fails)
    refused(r"\(encode_jpegs_cuda: .* nvJPEG support\); install a torchvision that has nvJPEG", "jpg", None, 3, CPU)
    monkeypatch.delattr(sys.modules["torchvision.io"], "encode_jpeg")
    refused("cannot encode on cpu .cannot import name", "jpg", None, 3, CPU)
    with monkeypatch.context() as patch:
        patch.setattr("sage_fast.generation.encoding.find_spec", lambda name: None)
        refused(r"not installed; pip install 'sage_fast\[nvjpeg\]'", "jpg", None, 3, CPU)
    monkeypatch.setattr("sage_fast.generation.encoding._is_gpu", lambda device: device.type == "cuda")
    refused("needs the model on a GPU, got it on cpu", "jpg", None, 3)


def test_auto_stays_on_the_host(stand_in):
    assert not choose_encoder("auto", "jpg", None, 3, CPU).name.startswith("nvjpeg") and stand_in == []


# --- with torchvision, on a GPU ---


@REAL
@pytest.mark.parametrize("side", [8, 32, 256])
@pytest.mark.parametrize("quality", [None, 75])
def test_images_of_cuda_are_nearly_those_of_pillow(side, quality):
    rng = torch.Generator().manual_seed(side)
    coarse = torch.rand(5, 3, 4, 4, generator=rng) * 255
    images = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear").to(torch.uint8)
    encoder = choose_encoder("nvjpeg", "jpg", quality, 3, torch.device("cuda"))
    pillow = choose_encoder("pillow", "jpg", quality, 3)
    files = encoder.encode_batch(images.cuda())
    assert files == encoder.encode_batch(images.cuda()) == encoder.encode_batch(images)
    assert files[:2] == encoder.encode_batch(images[:2].cuda())
    for image, file in zip(images.permute(0, 2, 3, 1).numpy(), files):
        assert encoder.encode(image) == file
        theirs = Image.open(io.BytesIO(pillow.encode(image)))
        ours = Image.open(io.BytesIO(file))
        assert ours.mode == "RGB" and [part[1:3] for part in ours.layer] == [(1, 1)] * 3  # 4:4:4
        apart = np.abs(np.asarray(ours).astype(int) - np.asarray(theirs))
        assert apart.mean() < 1 and apart.max() <= 16


@REAL
def test_a_run_on_cuda_repeats(tiny_bundle, tiny_shots, tmp_path):
    there = FewShotPipeline.from_bundle(tiny_bundle, "cuda")
    for name in ("a", "b"):
        generate(there, tiny_shots, tmp_path / name, CONFIG)
    assert images_of(tmp_path / "a") == images_of(tmp_path / "b")
    generate(there, tiny_shots, tmp_path / "host", replace(CONFIG, encoder="pillow"))
    for ours, theirs in zip(sorted((tmp_path / "a").glob("*/*.jpg")), sorted((tmp_path / "host").glob("*/*.jpg"))):
        apart = np.abs(np.asarray(Image.open(ours)).astype(int) - np.asarray(Image.open(theirs)))
        assert ours.name == theirs.name and apart.mean() < 1.5
    assert verify(tmp_path / "a").problems == []
    assert regenerate(tmp_path / "a" / "manifest.jsonl", 12, tmp_path / "c.jpg", there).file.exists()
