"""Real and generated samples as a stream: each in one worker of one rank, and loaders that take no sampler."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from test_mixing import CLASSES, Real, to_tensor
from torch.utils.data import DataLoader, IterableDataset

from sage_fast.augmenter import Augmenter
from sage_fast.errors import InputError
from sage_fast.generation import GenerateConfig
from sage_fast.mixing import MixedStream, _Thread


@pytest.fixture(scope="module")
def augmenter(tiny_bundle, tiny_shots):
    return Augmenter(tiny_bundle, tiny_shots, GenerateConfig(batch=3))


@pytest.fixture
def dataset(augmenter):
    with augmenter.dataset(Real(), 0.5, transform=to_tensor, seed=-3) as made:
        yield made


def flat(batches):
    return torch.cat([images for images, _ in batches]).flatten(1).tolist()


def of_rank(stream, monkeypatch, rank, world_size, workers):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    return len(stream), [place.item() for place, _ in DataLoader(stream, batch_size=None, num_workers=workers)]


def test_it_has_every_sample_once_in_an_order_of_the_epochs_own(dataset):
    stream = MixedStream(dataset)
    assert isinstance(stream, IterableDataset) and len(stream) == len(dataset) == 24
    orders = []
    for epoch in (0, 1, 0):
        stream.set_epoch(epoch)
        found = [image.flatten().tolist() for image, _ in stream]
        assert sorted(found) == sorted(dataset[i][0].flatten().tolist() for i in range(24))
        orders.append([label for _, label in stream])
    assert orders[0] == orders[2] != orders[1]
    assert [label for _, label in MixedStream(dataset, shuffle=False)] == [dataset[i][1] for i in range(24)]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_persistent_workers_share_the_samples_of_each_epoch(dataset, method):
    loader = DataLoader(
        MixedStream(dataset), batch_size=4, num_workers=2, multiprocessing_context=method, persistent_workers=True
    )
    assert len(loader) == 6
    seen = []
    for epoch in range(2):
        dataset.set_epoch(epoch)
        seen.append(flat(loader))
        assert sorted(seen[-1]) == sorted(dataset[i][0].flatten().tolist() for i in range(24))
    assert seen[0] != seen[1]
    del loader


@pytest.mark.parametrize("world_size", [2, 5])
def test_ranks_have_samples_of_their_own_and_as_many(dataset, monkeypatch, world_size):
    stream = MixedStream(Labels(dataset))
    alone, in_workers = (
        [of_rank(stream, monkeypatch, rank, world_size, workers) for rank in range(world_size)] for workers in (0, 2)
    )
    assert {length for length, _ in alone} == {24 // world_size} == {len(own) for _, own in alone}
    together = [place for _, own in alone for place in own]
    assert len(set(together)) == len(together) == 24 // world_size * world_size
    assert [sorted(own) for _, own in in_workers] == [sorted(own) for _, own in alone]


def test_the_ranks_are_those_that_lightning_names_before_the_stream_is_read(dataset, monkeypatch):
    stream = MixedStream(Labels(dataset))
    for name, value in (("WORLD_SIZE", "2"), ("NODE_RANK", "0"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    first = [place.item() for place, _ in stream]
    monkeypatch.setenv("LOCAL_RANK", "1")
    second = [place.item() for place, _ in stream]
    assert sorted(first + second) == list(range(24)) and len(first) == len(second)
    monkeypatch.setenv("NODE_RANK", "1")
    with pytest.raises(InputError, match="RANK and WORLD_SIZE must be"):
        MixedStream(dataset)


@pytest.mark.parametrize("workers", [2, 3])
def test_workers_that_know_the_batch_size_give_the_batches_of_none(dataset, workers):
    stream = MixedStream(Labels(dataset), batch_size=5)
    alone, together = ([places.tolist() for places, _ in DataLoader(stream, 5, num_workers=n)] for n in (0, workers))
    assert alone == together and len(together) == len(DataLoader(stream, 5)) == 5
    with pytest.raises(InputError, match="batch_size must be at least 1, got 0"):
        MixedStream(dataset, batch_size=0)


class Labels:
    """A dataset's places in place of its samples."""

    def __init__(self, dataset):
        self.seed, self.epoch, self._len = dataset.seed, dataset.epoch, len(dataset)

    def __len__(self):
        return self._len

    def __getitem__(self, index):
        return torch.tensor(index), 0


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_of_timm(augmenter, workers):
    create_loader = pytest.importorskip("timm.data", reason="timm is not installed").create_loader
    with augmenter.dataset(Real(), 0.5) as dataset:
        stream = MixedStream(dataset)
        loader = create_loader(
            stream, (3, 16, 16), 4, is_training=True, use_prefetcher=False, num_workers=workers,
            persistent_workers=workers > 0,
        )  # fmt: skip
        assert stream.transform is not None
        for epoch in range(2):
            stream.set_epoch(epoch)
            batches = list(loader)
            assert sum(len(images) for images, _ in batches) == 24
            assert batches[0][0].shape[1:] == (3, 16, 16)
            assert {label for _, labels in batches for label in labels.tolist()} <= set(range(len(CLASSES)))
        del loader


def test_the_trainer_of_lightning(dataset, tmp_path):
    lightning = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")
    seen = []

    class Watch(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))

        def training_step(self, batch, _):
            seen.extend((self.current_epoch, image.flatten().tolist()) for image in batch[0])
            return self.weight * batch[0].float().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    class Epochs(lightning.Callback):
        def on_train_epoch_start(self, trainer, _):
            trainer.train_dataloader.dataset.set_epoch(trainer.current_epoch)

    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", callbacks=[Epochs()], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(Watch(), DataLoader(MixedStream(dataset, batch_size=5), batch_size=5, num_workers=2))
    for epoch in range(2):
        dataset.set_epoch(epoch)
        expected = sorted(dataset[i][0].flatten().tolist() for i in range(24))
        assert sorted(image for number, image in seen if number == epoch) == expected


def test_the_thread_on_a_gpu_draws_behind_what_prepared_the_pipeline(monkeypatch):
    """Its stream waits for nothing by itself; here is no GPU, only what is asked of it."""
    asked, device = [], torch.device("cuda:1")

    class Stream:
        def __init__(self, where):
            asked.append(("made", where))

        def wait_stream(self, other):
            asked.append(("waits", other))

    @contextmanager
    def under(stream):
        asked.append(("draws", type(stream)))
        yield

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", under)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda where: f"default of {where}")
    prepared = SimpleNamespace(pipeline=SimpleNamespace(device=device))
    _Thread._run(SimpleNamespace(prepared=prepared, _steps=lambda: iter(())))
    assert asked == [("made", device), ("waits", "default of cuda:1"), ("draws", Stream)]
