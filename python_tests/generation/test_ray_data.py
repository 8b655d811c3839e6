"""Shards on a real Ray cluster of this machine, one of whose workers is killed. Skipped where Ray is not installed."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sage_fast import cli
from sage_fast.augmenter import Augmenter
from sage_fast.errors import InputError
from sage_fast.generation import GenerateConfig, generate, ray_data
from sage_fast.generation.ray_data import generate_on_ray
from sage_fast.generation.verifying import verify

CONFIG = GenerateConfig(n=300, batch=3, shard=8, fusion="pixel", device="cpu")


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name[0] != "."}


@pytest.fixture(scope="module")
def ray():
    """A cluster of two processors that this test starts and ends."""
    ray = pytest.importorskip("ray", reason="Ray is not installed (pip install 'sage_fast[ray]')")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
        try:
            ray.init(num_cpus=2, include_dashboard=False, object_store_memory=80 << 20, log_to_driver=False)
        except Exception as error:  # a machine where it cannot open what it needs says nothing about this package
            pytest.skip(f"Ray does not start here: {error}")
        yield ray
        ray.shutdown()


def ancestors(process):
    while process > 1:
        yield process
        process = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def workers_of_this_test():
    """Processes that Ray started for ours and that draw shards."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if b"ShardWriter" in (folder / "cmdline").read_bytes() and os.getpid() in ancestors(int(folder.name)):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


@pytest.mark.parametrize("format", ["folder", "webdataset"])
def test_two_workers_of_which_one_is_killed_make_the_files_of_one_process(
    ray, tiny_bundle, tiny_shots, tmp_path, format
):
    config, killed, seen = replace(CONFIG, format=format), [], []

    def kill_one(done, total):
        seen.append(done)
        if not killed and done < total:
            killed.extend(workers_of_this_test()[:1])
            os.kill(killed[0], signal.SIGKILL)

    generate(tiny_bundle, tiny_shots, tmp_path / "one", config)
    summary = generate_on_ray(tiny_bundle, tiny_shots, tmp_path / "ray", config, kill_one, n_workers=2)
    assert killed and seen[0] < 300 and seen[-1] == 600
    assert killed[0] not in workers_of_this_test()
    assert (summary.n_new, summary.missing) == (600, 0)
    assert contents(tmp_path / "ray") == contents(tmp_path / "one")
    assert not verify(tmp_path / "ray", workers=1).problems and not (tmp_path / "ray" / ".sage_fast").exists()


def test_the_command_line_resumes_on_ray_what_ranks_began(ray, tiny_bundle, tiny_shots, tmp_path, monkeypatch, capsys):
    config = replace(CONFIG, n=20)
    generate(tiny_bundle, tiny_shots, tmp_path / "one", config)
    with monkeypatch.context() as patch:
        patch.setenv("RANK", "0")
        patch.setenv("WORLD_SIZE", "2")
        assert generate(tiny_bundle, tiny_shots, tmp_path / "out", config).missing == 2
    monkeypatch.chdir(tmp_path)
    settings = "-n 20 --batch 3 --shard 8 --fusion pixel --device cpu --resume --ray-workers 1"
    words = ["generate", "--shots", str(tiny_shots), "--model", str(tiny_bundle), "--out", "out", *settings.split()]
    assert cli.main(words) in (0, None)
    assert "16 images of 2 categories were drawn, 24 were there already" in capsys.readouterr().out
    assert contents(tmp_path / "out") == contents(tmp_path / "one")


def test_an_error_of_a_worker_is_one_sentence(ray, tiny_bundle, tiny_shots, tmp_path, monkeypatch):
    shots, write = shutil.copytree(tiny_shots, tmp_path / "novel"), ray_data._write

    def spoil(*arguments):
        shutil.copy(shots / "lily" / "0.png", shots / "rose" / "0.png")
        write(*arguments)

    monkeypatch.setattr(ray_data, "_write", spoil)
    with pytest.raises(InputError, match=r"^Shot '.*rose/0.png' is not the file that the plan was made with; bring"):
        generate_on_ray(tiny_bundle, shots, tmp_path / "out", replace(CONFIG, n=20), n_workers=1)


def test_the_augmenter_is_a_stage(ray, tiny_bundle, tiny_shots):
    config = GenerateConfig(n=5, device="cpu")
    rows = ray.data.range(10).map_batches(
        Augmenter,
        fn_constructor_args=(str(tiny_bundle), str(tiny_shots), config),
        batch_size=4,
        compute=ray.data.ActorPoolStrategy(size=1),
    )
    found = {row["id"]: (row["image"], row["category"], row["label"]) for row in rows.take_all()}
    expected = Augmenter(tiny_bundle, tiny_shots, config)({"id": range(10)})
    for number in range(10):
        image, category, label = found[number]
        np.testing.assert_array_equal(image, expected["image"][number])
        assert (category, label) == (expected["category"][number], expected["label"][number])


def test_what_cannot_be_asked_for(tiny_bundle, tiny_shots, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="n_workers must be at least 1, got 0"):
        generate_on_ray(tiny_bundle, tiny_shots, tmp_path / "out", n_workers=0)
    with monkeypatch.context() as patch:
        patch.setenv("RANK", "0")
        patch.setenv("WORLD_SIZE", "2")
        with pytest.raises(InputError, match="unset RANK and WORLD_SIZE"):
            generate_on_ray(tiny_bundle, tiny_shots, tmp_path / "out")
    (tmp_path / "ray").mkdir()  # a folder of that name is no Ray
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "ray.data", None)
    with pytest.raises(InputError, match=r"needs Ray; pip install 'sage_fast\[ray\]'"):
        generate_on_ray(tiny_bundle, tiny_shots, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_node_with_another_model_is_refused(tiny_bundle, tmp_path):
    job = ray_data._Job(str(tiny_bundle), str(tmp_path), CONFIG, "another")
    found = ray_data.ShardWriter(job)({"shard": np.array([0])})
    assert "the plan was made with another; use one model." in str(found["error"][0])
