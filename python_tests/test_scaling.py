"""docs/scaling.md: its Python runs, its commands parse, and its table is what its formula gives."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from command_lines import parses
from PIL import Image
from torch.utils.data import DataLoader, Dataset

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "scaling.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.S | re.M)


class Grey(Dataset):
    """Three grey images."""

    classes = ["rose", "lily"]

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return Image.new("RGB", (32, 32)), index % 2


def test_the_training_loop_runs(tiny_shots, tmp_path, monkeypatch):
    shutil.copytree(tiny_shots, tmp_path / "NOVEL_DIR")
    monkeypatch.chdir(tmp_path)
    labels = []
    names = {
        "DataLoader": DataLoader,
        "real": Grey(),
        "transform": lambda image: torch.from_numpy(np.array(image)),
        "step": lambda batch, label: labels.extend(label.tolist()),
    }
    exec(blocks("python")[0], names)
    assert names["images"]["image"].shape == (3, 3, 32, 32) and names["images"]["category"].tolist() == ["lily"] * 3
    assert sorted(labels) == sorted(2 * [0, 1, 0, 1, 0, 1])


def test_the_table_is_what_the_formula_gives():
    names = {}
    exec(blocks("python")[1], names)
    words = {10**6: "a million", 10**8: "100 million", 10**9: "a billion"}
    for n_images, gpus, found in names["table"]:
        hours = f"{found['hours']:.2f} | {found['manifest']:.2f} | {found['terabytes']:.2f}"
        costs = f"${found['devices']:.0f} | ${found['requests']:.2f} | ${found['a month of storage']:.0f}"
        assert f"| {words[n_images]} | {gpus} | {hours} | {costs} |" in PAGE


def commands():
    text = "\n".join([*blocks("sh"), *re.findall(r"entrypoint: (.*)", PAGE)]).replace("\\\n", " ")
    return [line.rstrip("'") for line in re.findall(r"(sage-fast generate [^#\n]*)", text)]


@pytest.mark.parametrize("line", commands())
def test_every_command_parses(line, monkeypatch):
    parses(line, monkeypatch)


@pytest.mark.parametrize("page", ["scaling.md", "generation.md"])
def test_every_shell_block_is_one(page):
    shell = shutil.which("bash")
    if shell is None:
        pytest.skip("no bash to read it")
    found = re.findall(r"^```sh\n(.*?)^```", (DOCS / page).read_text(encoding="utf-8"), flags=re.S | re.M)
    for block in found:
        subprocess.run([shell, "-n"], input=block, text=True, check=True)
    assert found


def test_the_job_of_slurm_gives_every_task_its_cores_and_its_number():
    job = next(block for block in blocks("sh") if "#SBATCH" in block)
    asked = dict(re.findall(r"--([\w-]+)=(\S+)", "".join(re.findall(r"^#SBATCH (.*\n)", job, flags=re.M))))
    assert asked["ntasks-per-node"] == asked["gpus-per-node"]
    assert int(re.search(r"--workers (\d+)", job)[1]) < int(asked["cpus-per-task"])
    for words in (
        "RANK=$SLURM_PROCID",
        "WORLD_SIZE=$SLURM_NTASKS",
        "LOCAL_RANK=$SLURM_LOCALID",
        '"$SLURM_CPUS_PER_TASK"',
    ):
        assert words in job


def test_the_job_of_kubernetes_is_yaml_whose_mounts_are_volumes():
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed (pip install 'sage_fast[plans]')")
    job = yaml.safe_load(blocks("yaml")[0])
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = job["spec"]
    groups = [spec["rayClusterSpec"]["headGroupSpec"], *spec["rayClusterSpec"]["workerGroupSpecs"]]
    for pod in (group["template"]["spec"] for group in groups):
        mounts = {mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]}
        assert mounts == {volume["name"] for volume in pod["volumes"]}
    assert f"--ray-workers {groups[1]['replicas']}" in spec["entrypoint"] and len(commands()) == 4
