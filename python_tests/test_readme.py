"""The README says what is true: its Python runs, its commands parse, its files are there."""

from __future__ import annotations

import importlib.util
import re
import shutil
from pathlib import Path

import pytest
import torch
from command_lines import parses
from nvlabs_pickles import write_nvlabs
from tiny_model import tiny_networks

from sage_fast import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.S | re.M)


def shell_lines(program: str) -> list[str]:
    lines = [line.split("#")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    return [line for line in lines if line.split()[:1] == [program]]


@pytest.fixture(scope="module")
def namespace(tiny_bundle, tiny_shots, tmp_path_factory):
    """The names that the Python blocks leave behind, run one after the other beside the folders they speak of."""
    names: dict[str, object] = {}
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("readme")
        shutil.copytree(tiny_bundle, folder / "RUN")
        shutil.copytree(tiny_shots, folder / "NOVEL_DIR")
        shutil.copytree(tiny_shots, folder / "REAL_DIR")
        shutil.copytree(tiny_shots / "lily", folder / "IMAGES")
        write_nvlabs(folder / "network.pkl", tiny_networks()[0])
        patch.chdir(folder)
        for number, block in enumerate(blocks("python")):
            exec(compile(block, f"README.md, Python block {number}", "exec"), names)
        names["folder"] = folder
    return names


def test_the_python_blocks_run(namespace):
    assert len(blocks("python")) >= 3
    result = namespace["result"]
    assert result.images.shape == (16, 3, 8, 8)
    assert result.fused["frequency"].shape == (16, 3, 8, 8)
    assert namespace["images_fused"].shape == (16, 3, 8, 8)
    assert namespace["irrelevant"].directions.shape[2] == 8
    assert 0 <= namespace["scores"].retention <= 1
    assert namespace["projection"].images.shape == (3, 3, 8, 8)


def test_step_by_step_is_what_the_pipeline_does(namespace):
    """Given the same random numbers, the ten lines and the one call draw the same images."""
    from sage_fast import FewShotEditor
    from sage_fast.pipeline import normals

    pipeline, shots, generator = namespace["pipeline"], namespace["shots"], namespace["generator"]
    n_similar = namespace["editor"].n_similar
    editor = FewShotEditor(pipeline.relevant, pipeline.irrelevant, n_similar=n_similar, each_shot=True)
    editor.fit(namespace["w_plus"], namespace["labels"])
    with torch.no_grad():
        distribution = editor.adapt(pipeline.embed(shots))
        noise = torch.stack([normals(0, "lily", j, distribution.n_random) for j in range(16)])
        w_plus = distribution.sample_with(noise, alpha=1.0)
        images = generator(w_plus + generator.latent_avg, noise=namespace["bundle"].noise).clamp(-1, 1)
    torch.testing.assert_close(images, namespace["result"].images, rtol=0, atol=1e-4)


def test_outputs_are_the_ones_the_table_lists(namespace):
    out = namespace["folder"] / "OUT"
    for name in ("lily/lily_00000.png", "rose/rose_00015.png", "contact_sheet.png", "manifest.jsonl", "config.json"):
        assert (out / name).is_file(), name
    listed = re.findall(r"`OUT/([^`]*)`", README)
    assert {"contact_sheet.png", "manifest.jsonl", "config.json", "report.md", "report.json"} <= set(listed)


@pytest.mark.parametrize("line", shell_lines("sage-fast"))
def test_every_command_parses(line, monkeypatch):
    parses(line, monkeypatch)


def test_every_command_of_the_program_is_shown():
    shown = {line.split()[1] for line in shell_lines("sage-fast")}
    assert shown | {"demo"} == set(cli.COMMANDS)  # the demo is shown as 'make demo'


def test_make_knows_the_targets():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M)
    for line in shell_lines("make"):
        assert line.split()[1] in targets


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_every_method_and_fusion_is_named():
    from sage_fast.pipeline import FUSIONS, METHODS

    for name in (*METHODS, *FUSIONS):
        assert f"`{name}`" in README


def test_modules_run_by_name_exist():
    for name in re.findall(r"python -m (sage_fast[\w.]*)", README):
        assert importlib.util.find_spec(name) is not None
