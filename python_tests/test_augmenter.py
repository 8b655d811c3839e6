"""Images by their numbers: the same in every copy, every order and every process."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

import sage_fast
from sage_fast.errors import InputError
from sage_fast.generation import GenerateConfig, draw_shard
from sage_fast.pipeline import FewShotPipeline

CONFIG = GenerateConfig(n=5, batch=3, shard=4, fusion="pixel")


@pytest.fixture(scope="module")
def augmenter(tiny_bundle, tiny_shots):
    return sage_fast.Augmenter(tiny_bundle, tiny_shots, CONFIG)


def test_shards_are_those_of_generate(augmenter):
    found = augmenter({"shard": np.array([2, 0])})
    expected = [draw_shard(augmenter.pipeline, augmenter.plan, shard) for shard in (2, 0)]
    np.testing.assert_array_equal(found["image"], np.concatenate(expected))
    assert found["id"].tolist() == [8, 9, 0, 1, 2, 3]
    assert found["category"].tolist() == ["rose"] * 2 + ["lily"] * 4
    assert found["label"].tolist() == [1, 1, 0, 0, 0, 0]
    assert found["index"].tolist() == [3, 4, 0, 1, 2, 3]


def test_images_by_their_ids_are_those_of_the_shards_in_any_order(augmenter):
    whole = augmenter({"shard": range(3)})
    order = np.random.default_rng(0).permutation(10)
    found = augmenter({"id": order})
    assert found["id"].tolist() == order.tolist()
    np.testing.assert_array_equal(found["image"], whole["image"][order])
    assert len(np.unique(whole["image"].reshape(10, -1), axis=0)) == 10


def test_an_empty_batch_has_all_columns(augmenter):
    found = augmenter({"id": []})
    assert found["image"].shape == (0, 3, 8, 8) and found["image"].dtype == np.uint8
    assert {len(column) for column in found.values()} == {0}


def test_a_pickled_copy_is_small_and_draws_the_same(augmenter, tiny_bundle, tmp_path, monkeypatch):
    data = pickle.dumps(augmenter)
    assert len(data) < 5000
    monkeypatch.chdir(tmp_path)
    copy = pickle.loads(data)
    np.testing.assert_array_equal(copy({"id": [7]})["image"], augmenter({"id": [7]})["image"])


def test_relative_folders_are_found_from_elsewhere(tiny_bundle, tiny_shots, tmp_path, monkeypatch, augmenter):
    (tmp_path / "model").symlink_to(tiny_bundle)
    (tmp_path / "novel").symlink_to(tiny_shots)
    monkeypatch.chdir(tmp_path)
    data = pickle.dumps(sage_fast.Augmenter("model", "novel", CONFIG))
    monkeypatch.chdir("/")
    np.testing.assert_array_equal(pickle.loads(data)({"id": [3]})["image"], augmenter({"id": [3]})["image"])


def test_a_given_pipeline_is_pickled_with_its_weights(augmenter, tiny_bundle, tiny_shots):
    given = sage_fast.Augmenter(FewShotPipeline.from_bundle(tiny_bundle), tiny_shots, CONFIG)
    copy = pickle.loads(pickle.dumps(given))
    np.testing.assert_array_equal(copy({"id": [1]})["image"], augmenter({"id": [1]})["image"])


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"row": [1]}, r"must have a column 'id' or 'shard', got \['row'\]"),
        ({"id": [10]}, "id must be 0 to 9 in this plan, got 10"),
        ({"id": 5}, "id must be a list of whole numbers, got 5"),
        ({"id": [1.5]}, r"id must be a list of whole numbers, got \[1.5\]"),
        ({"shard": [-1]}, "shard must be 0 to 2 in this plan, got -1"),
    ],
)
def test_batches_that_cannot_be(augmenter, batch, message):
    with pytest.raises(InputError, match=message):
        augmenter(batch)
