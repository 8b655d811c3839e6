"""The demo, on a model of random weights: what it writes and says, not how good its pictures are."""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sage_fast import cli
from sage_fast.data import flora
from sage_fast.data.latent_table import LatentTable
from sage_fast.demo import KINDS
from sage_fast.evaluation.oracle import Oracle, OracleConfig, save_oracle
from sage_fast.models.encoders import PyramidEncoder
from sage_fast.models.stylegan2 import Generator
from sage_fast.models.weights import save_bundle

RESOLUTION, N_CATEGORIES, N_SHOTS, N, N_REAL = 16, 2, 3, 5, 4
SMALL = [f"--n-categories={N_CATEGORIES}", f"--n-shots={N_SHOTS}", f"--n={N}", f"--n-real={N_REAL}"]


@pytest.fixture(scope="module")
def flora_bundle(tmp_path_factory):
    """A 16 px bundle of random weights whose categories are six of flora's seen ones."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        G = Generator(RESOLUTION, 16, n_mapping=2, channel_base=64, channel_max=8)
        E = PyramidEncoder(RESOLUTION, G.n_latent, 16, channel_base=64, channel_max=8, head_width=4)
        G.latent_avg.copy_(G.mean_latent(100))
        codes = LatentTable(
            torch.randn(24, G.n_latent, 16),
            torch.arange(6).repeat_interleave(4),
            [category.name for category in flora.categories()[:6]],
        )
        directions = torch.randn(G.n_latent, 16, 4)
    folder = tmp_path_factory.mktemp("bundle")
    return save_bundle(folder, generator=G, encoder=E, directions=directions, codes=codes)


@pytest.fixture(scope="module")
def words(flora_bundle, tmp_path_factory):
    """The command without its output folder; the oracle is an untrained one."""
    folder = tmp_path_factory.mktemp("oracle")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        save_oracle(folder / "oracle.safetensors", Oracle(RESOLUTION, width=8), OracleConfig(resolution=RESOLUTION), {})
    return ["demo", f"--model={flora_bundle}", f"--oracle={folder}", *SMALL]


@pytest.fixture(scope="module")
def demo(words, tmp_path_factory):
    """(folder, what was printed) of one run."""
    out, printed = tmp_path_factory.mktemp("demo") / "out", io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert cli.main([*words, f"--out={out}"]) == 0
    return out, printed.getvalue()


def decoded(folder: Path) -> dict[str, np.ndarray]:
    return {path.relative_to(folder).as_posix(): np.array(Image.open(path)) for path in sorted(folder.rglob("*.png"))}


def test_every_kind_has_its_images(demo):
    out, _ = demo
    names = [category.name for category in flora.categories()[flora.N_SEEN : flora.N_SEEN + N_CATEGORIES]]
    for kind, count in {"shots": N_SHOTS, "real": N_REAL, **dict.fromkeys(KINDS, N)}.items():
        for name in names:
            images = list(decoded(out / kind / name).values())
            assert len(images) == count, (kind, name)
            assert all(image.shape == (RESOLUTION, RESOLUTION, 3) for image in images)


def test_categories_are_unseen_and_real_images_are_not_the_given_ones(demo):
    out, _ = demo
    shots, real = decoded(out / "shots"), decoded(out / "real")
    seen = {category.name for category in flora.categories()[: flora.N_SEEN]}
    assert not seen & {name.split("/")[0] for name in shots}
    assert not {image.tobytes() for image in shots.values()} & {image.tobytes() for image in real.values()}


def test_fusions_differ_from_each_other(demo):
    out, _ = demo
    kinds = {kind: decoded(out / kind / f"flora_{flora.N_SEEN:03d}") for kind in KINDS}
    drawn = {kind: np.stack(list(images.values())).tobytes() for kind, images in kinds.items()}
    assert len(set(drawn.values())) == len(KINDS)


def test_report_has_a_row_for_every_kind(demo):
    out, printed = demo
    rows = json.loads((out / "report.json").read_text())["rows"]
    assert set(rows) == set(KINDS)
    for kind, row in rows.items():
        assert row["n_images"] == N * N_CATEGORIES and row["n_categories"] == N_CATEGORIES
        assert f"| {kind} |" in printed and f"| {kind} |" in (out / "report.md").read_text()


def test_what_is_printed_is_there(demo):
    out, printed = demo
    paths = re.findall(rf"{re.escape(str(out))}\S*", printed)
    assert {Path(path).name for path in paths} == {"shots", "contact_sheet.png", "report.md"}
    assert all(Path(path).exists() for path in paths)
    sheet = Image.open(out / "contact_sheet.png")
    assert sheet.height > (1 + len(KINDS)) * N_CATEGORIES * 64


def test_a_second_run_replaces_the_first_with_the_same_images(demo, words):
    out, _ = demo
    before = decoded(out)
    (out / "sage" / "stale.png").write_bytes(b"")
    assert cli.main([*words, f"--out={out}"]) == 0
    after = decoded(out)
    assert before.keys() == after.keys()
    for name, image in before.items():
        np.testing.assert_array_equal(image, after[name])


def test_a_model_of_other_images_is_refused(tiny_bundle, tmp_path, capsys):
    assert cli.main(["demo", f"--out={tmp_path / 'out'}", f"--model={tiny_bundle}"]) == 2
    assert "trained on flora" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_the_demos_is_left_alone(words, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "diary.txt").write_text("dear diary")
    assert cli.main([*words, f"--out={tmp_path / 'out'}"]) == 2
    assert "so nothing in it is deleted; empty it yourself or give another folder." in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["diary.txt"]
