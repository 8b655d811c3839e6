"""What lies in the output, read back with the programs that people use for it."""

from __future__ import annotations

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from sage_fast.data.writers import read_manifest
from sage_fast.errors import InputError
from sage_fast.generation import GenerateConfig, generate
from sage_fast.generation.regenerating import regenerate
from sage_fast.generation.verifying import verify
from sage_fast.pipeline import FewShotPipeline


@pytest.fixture(scope="module")
def pipeline(tiny_bundle):
    return FewShotPipeline.from_bundle(tiny_bundle)


@pytest.fixture(scope="module")
def folder(pipeline, tiny_shots, tmp_path_factory):
    """The same images as an ImageFolder of PNG files."""
    out = tmp_path_factory.mktemp("formats") / "folder"
    generate(pipeline, tiny_shots, out, GenerateConfig(n=11))
    return out


def expected(folder):
    return [np.asarray(Image.open(folder / line["file"])) for line in read_manifest(folder / "manifest.jsonl")]


def test_webdataset(pipeline, tiny_shots, tmp_path, folder):
    generate(pipeline, tiny_shots, tmp_path / "out", GenerateConfig(n=11, format="webdataset", shard=8))
    tars = sorted(path.name for path in (tmp_path / "out").glob("*.tar"))
    assert tars == ["shard-000000.tar", "shard-000001.tar", "shard-000002.tar"]
    members = []
    for name in tars:
        with tarfile.open(tmp_path / "out" / name) as tar:
            members += [(member, tar.extractfile(member).read()) for member in tar]
    assert [member.name for member, _ in members[:4]] == [
        "000000000.png", "000000000.cls", "000000000.json", "000000001.png"
    ]  # fmt: skip
    assert all((member.mtime, member.uid, member.uname) == (0, 0, "") for member, _ in members)
    images = [np.asarray(Image.open(io.BytesIO(data))) for member, data in members if member.name.endswith(".png")]
    np.testing.assert_array_equal(images, expected(folder))
    assert [int(data) for member, data in members if member.name.endswith(".cls")] == 11 * [0] + 11 * [1]
    about = [json.loads(data) for member, data in members if member.name.endswith(".json")]
    assert [(one["category"], one["index"]) for one in about[10:12]] == [("lily", 10), ("rose", 0)]
    lines = read_manifest(tmp_path / "out" / "manifest.jsonl")
    assert lines[9]["file"] == "shard-000001.tar/000000009.png" and len(lines) == 22
    assert verify(tmp_path / "out").problems == []


def test_webdataset_is_read_by_webdataset(pipeline, tiny_shots, tmp_path, folder):
    wds = pytest.importorskip("webdataset")
    generate(pipeline, tiny_shots, tmp_path / "out", GenerateConfig(n=11, format="webdataset", shard=16))
    urls = [str(path) for path in sorted((tmp_path / "out").glob("*.tar"))]
    samples = list(wds.WebDataset(urls, shardshuffle=False).decode("rgb8").to_tuple("png", "cls", "json"))
    np.testing.assert_array_equal([image for image, _, _ in samples], expected(folder))
    assert [label for _, label, _ in samples] == 11 * [0] + 11 * [1]
    assert samples[3][2]["index"] == 3


def test_tar_files_by_size(pipeline, tiny_shots, tmp_path):
    config = GenerateConfig(n=60, format="webdataset", shard_mb=0.1)
    generate(pipeline, tiny_shots, tmp_path / "out", config)
    sizes = [path.stat().st_size for path in sorted((tmp_path / "out").glob("*.tar"))]
    assert len(sizes) > 2 and all(80_000 < size < 120_000 for size in sizes[:-1])
    assert (
        generate(pipeline, tiny_shots, tmp_path / "out", GenerateConfig(**vars(config) | {"resume": True})).n_new == 0
    )


def test_safetensors(pipeline, tiny_shots, tmp_path, folder):
    generate(pipeline, tiny_shots, tmp_path / "out", GenerateConfig(n=11, format="safetensors", shard=8))
    with safe_open(tmp_path / "out" / "images.safetensors", "pt") as file:
        assert json.loads(file.metadata()["categories"]) == ["lily", "rose"]
        images = file.get_tensor("images")
        assert torch.equal(file.get_tensor("labels"), torch.tensor(11 * [0] + 11 * [1]))
        assert torch.equal(file.get_tensor("indices"), torch.arange(11).repeat(2))
    np.testing.assert_array_equal(images.permute(0, 2, 3, 1), expected(folder))
    assert verify(tmp_path / "out").problems == []
    assert regenerate(tmp_path / "out" / "manifest.jsonl", 12, tmp_path / "a.png", pipeline).same
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a.png")), images[12].permute(1, 2, 0))


@pytest.mark.parametrize("image", ["jpg", "webp"])
def test_jpeg_and_webp(pipeline, tiny_shots, tmp_path, folder, image):
    generate(pipeline, tiny_shots, tmp_path / "out", GenerateConfig(n=11, image=image, encoder="pillow", quality=90))
    files = sorted((tmp_path / "out").glob(f"*/*.{image}"))
    assert len(files) == 22
    same = io.BytesIO()
    options = {"jpg": {"format": "JPEG", "subsampling": 0}, "webp": {"format": "WEBP", "method": 0}}[image]
    Image.fromarray(expected(folder)[13]).save(same, quality=90, **options)
    np.testing.assert_array_equal(np.asarray(Image.open(files[13])), np.asarray(Image.open(same)))
    assert verify(tmp_path / "out").problems == []


@pytest.mark.parametrize("format", ["folder", "webdataset", "safetensors"])
def test_any_url(pipeline, tiny_shots, tmp_path, format):
    fsspec = pytest.importorskip("fsspec")
    config = GenerateConfig(n=5, shard=4, format=format)
    generate(pipeline, tiny_shots, tmp_path / "out", config)
    url = f"memory://{tmp_path.name}/{format}"
    generate(pipeline, tiny_shots, url, config)
    system, root = fsspec.core.url_to_fs(url)
    found = {name.removeprefix(root + "/"): system.cat_file(name) for name in system.find(root)}
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file() and path.name[0] != "."]
    here = {path.relative_to(tmp_path / "out").as_posix(): path.read_bytes() for path in files}
    assert {name: data for name, data in found.items() if "/." not in f"/{name}"} == here
    assert verify(url).problems == []
    assert generate(pipeline, tiny_shots, url, GenerateConfig(**vars(config) | {"resume": True})).n_new == 0
    with pytest.raises(InputError, match="not empty"):
        generate(pipeline, tiny_shots, url, config)
    system.rm_file(f"{root}/manifest.jsonl")
    assert "shards are not written" in str(verify(url))
    assert generate(pipeline, tiny_shots, url, GenerateConfig(**vars(config) | {"overwrite": True})).n_new == 10


def test_parquet(pipeline, tiny_shots, tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    out = tmp_path / "out"
    generate(pipeline, tiny_shots, out, GenerateConfig(n=3, parquet=True))
    lines, rows = read_manifest(out / "manifest.jsonl"), pq.read_table(out / "manifest.parquet").to_pylist()
    assert [{key: value for key, value in row.items() if value is not None} for row in rows] == lines


def test_parquet_without_pyarrow(pipeline, tiny_shots, tmp_path, monkeypatch):
    monkeypatch.setattr("sage_fast.generation.run.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'sage_fast\[parquet\]'"):
        generate(pipeline, tiny_shots, tmp_path / "out", GenerateConfig(n=3, parquet=True))
    assert not (tmp_path / "out").exists()
