"""A dataset of real and generated samples: which, how many, from when, in which processes, and how it ends."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from sage_fast import mixing
from sage_fast.augmenter import Augmenter
from sage_fast.errors import InputError
from sage_fast.generation import GenerateConfig

CLASSES = ["daisy", "lily", "oak", "rose"]
N_REAL = 12


class Real(Dataset):
    """Images of one colour; the value of sample i is i, its label i mod 4."""

    classes = CLASSES

    def __init__(self, transform=None):
        self.transform = transform

    def __len__(self):
        return N_REAL

    def __getitem__(self, index):
        image = Image.new("RGB", (8, 8), (index, index, index))
        return (image if self.transform is None else self.transform(image)), index % 4


def to_tensor(image):
    return torch.from_numpy(np.asarray(image).copy())


@pytest.fixture(scope="module")
def augmenter(tiny_bundle, tiny_shots):
    return Augmenter(tiny_bundle, tiny_shots, GenerateConfig(batch=3))


@pytest.fixture
def mixed(augmenter):
    """``mixed(...)``: a dataset that is closed at the end."""
    made = []

    def make(real=None, ratio=0.5, **settings):
        made.append(augmenter.dataset(Real() if real is None else real, ratio, **{"transform": to_tensor} | settings))
        return made[-1]

    yield make
    for dataset in made:
        dataset.close()


def samples(dataset):
    return torch.stack([dataset[i][0] for i in range(len(dataset))])


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "sage_fast-mixing"]


@pytest.mark.parametrize(("ratio", "generated"), [(0.5, 12), (0.25, 4), (0.75, 36), (0.001, 1)])
def test_the_ratio_is_the_share_of_generated_samples(mixed, ratio, generated):
    dataset = mixed(ratio=ratio)
    assert len(dataset) == N_REAL + generated and dataset.n_generated == generated
    assert dataset[-1][0].equal(dataset[len(dataset) - 1][0])
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def test_real_samples_first_then_the_novel_classes_in_turns_with_the_labels_of_the_real_dataset(mixed):
    dataset = mixed()
    assert [int(dataset[i][0][0, 0, 0]) for i in range(N_REAL)] == list(range(N_REAL))
    assert [dataset[i][1] for i in range(N_REAL)] == [i % 4 for i in range(N_REAL)]
    assert [dataset[i][1] for i in range(N_REAL, len(dataset))] == [1, 3] * 6


def test_a_label_says_what_the_image_shows(mixed, augmenter):
    dataset = mixed()
    drawn = augmenter({"id": range(256)})
    known = {image.tobytes(): category for image, category in zip(drawn["image"], drawn["category"])}
    for i in range(N_REAL, len(dataset)):
        image, label = dataset[i]
        assert known[image.permute(2, 0, 1).numpy().tobytes()] == CLASSES[label]


def test_what_the_real_dataset_makes_of_its_labels_is_made_of_the_generated_ones(mixed):
    real = Real()
    real.target_transform = lambda label: label + 100
    assert [mixed(real)[N_REAL + i][1] for i in range(3)] == [101, 103, 101]


@pytest.mark.parametrize("sample", [{"image": None, "label": 1}, Image.new("RGB", (8, 8)), (1,)])
def test_a_real_sample_that_is_no_pair_is_named(mixed, sample):
    real = Real()
    real.__class__ = type("Others", (Real,), {"__getitem__": lambda self, index: sample})
    with pytest.raises(InputError, match=rf"real\[3\] must be \(image, label\), got {type(sample).__name__};"):
        mixed(real)[3]


def test_a_cache_without_shared_memory_is_refused_in_a_sentence(mixed, monkeypatch):
    def refuse(tensor):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", refuse)
    with pytest.raises(InputError, match=r"12 images takes .* MiB of shared memory.*No space left.*make cache smaller"):
        mixed()


def set_epochs(dataset):
    for epoch in range(3):
        dataset.set_epoch(epoch)
        samples(dataset)


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_a_process_that_was_given_the_dataset_sets_its_epochs(mixed, start):
    dataset = mixed(transform=to_tensor)
    time.sleep(0.5)  # so that the thread is at rest
    process = torch.multiprocessing.get_context(start).Process(target=set_epochs, args=(dataset,))
    process.start()
    process.join(60)
    ended = process.exitcode
    process.kill()
    assert ended == 0 and dataset.epoch == 2


def test_samples_are_a_function_of_seed_epoch_index_and_rank(mixed, monkeypatch):
    dataset, order = mixed(), np.random.default_rng(1).permutation(24)
    first = samples(dataset)
    other = mixed()
    assert torch.stack([other[i][0] for i in order]).equal(first[order])
    dataset.set_epoch(2)
    later = samples(dataset)
    assert dataset.epoch == 2 and later[:N_REAL].equal(first[:N_REAL])
    other.set_epoch(1)
    other.set_epoch(2)
    assert samples(other).equal(later)
    other.set_epoch(0)
    assert samples(other).equal(first)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    sets = [first, later, samples(mixed(seed=1)), samples(mixed())]
    generated = torch.cat([one[N_REAL:] for one in sets]).flatten(1)
    assert len(generated.unique(dim=0)) == 48


def test_the_cache_is_bounded_and_its_images_are_shared(mixed):
    dataset = mixed(ratio=0.75, cache=5)
    images = samples(dataset)[N_REAL:]
    assert len(dataset._shown.pixels) == 4 and len(images.flatten(1).unique(dim=0)) == 4
    assert [dataset[N_REAL + i][1] for i in range(4)] == [1, 3, 1, 3]
    assert images[:4].equal(images[4:8])


def test_images_serve_several_epochs_and_are_renewed_in_turns(mixed):
    dataset = mixed(epochs_per_image=2)
    epochs = []
    for epoch in range(5):
        dataset.set_epoch(epoch)
        epochs.append(samples(dataset)[N_REAL:].flatten(1))
    same = [(a == b).all(1).float().mean().item() for a, b in zip(epochs, epochs[1:])]
    assert same == [0.5] * 4
    assert not (epochs[0] == epochs[2]).all(1).any()


def test_the_next_epoch_is_drawn_ahead_and_no_further(mixed, monkeypatch):
    drawn, draw = [], mixing._Thread._draw

    def watched(thread, chunk, version):
        drawn.append((version, chunk))
        return draw(thread, chunk, version)

    monkeypatch.setattr(mixing._Thread, "_draw", watched)
    dataset = mixed(cache=6)
    for epoch in range(3):
        dataset.set_epoch(epoch)
        samples(dataset)
        deadline = time.monotonic() + 20
        while len(drawn) < 2 * (epoch + 2) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        assert sorted(drawn) == [(version, chunk) for version in range(epoch + 2) for chunk in range(2)]


def test_what_is_waited_for_is_drawn_next(mixed, monkeypatch):
    drawn, draw, waited = [], mixing._Thread._draw, threading.Event()

    def watched(thread, chunk, version):
        drawn.append(chunk)
        if len(drawn) == 1:
            assert waited.wait(20)
        return draw(thread, chunk, version)

    monkeypatch.setattr(mixing._Thread, "_draw", watched)
    monkeypatch.setattr(mixing.time, "sleep", lambda seconds: waited.set() or threading.Event().wait(seconds))
    dataset = mixed()
    assert dataset._shown.read(11).shape == (3, 8, 8)
    assert 3 in drawn[:2]  # of 0 to 3, after what was begun before


def test_a_forked_process_that_drops_the_dataset_stops_nothing(mixed):
    dataset = mixed()
    samples(dataset)
    child = os.fork()
    if not child:
        dataset._close()  # what dropping it does
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    dataset.set_epoch(5)
    assert len(samples(dataset)) == 24


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_see_the_same_samples_in_every_epoch(mixed, method):
    dataset, alone = mixed(), mixed()
    loader = DataLoader(
        dataset, batch_size=4, shuffle=True, num_workers=2, multiprocessing_context=method, persistent_workers=True
    )
    for epoch in range(3):
        dataset.set_epoch(epoch)
        alone.set_epoch(epoch)
        found = torch.cat([images for images, _ in loader]).flatten(1)
        expected = samples(alone).flatten(1)
        assert sorted(found.tolist()) == sorted(expected.tolist())
    del loader


def test_workers_that_are_forked_anew_each_epoch_while_the_thread_draws(mixed):
    dataset = mixed(ratio=0.9)
    loader = DataLoader(dataset, batch_size=16, shuffle=True, num_workers=2, multiprocessing_context="fork")
    for epoch in range(6):
        dataset.set_epoch(epoch)
        assert sum(len(images) for images, _ in loader) == len(dataset)
        if epoch == 3:
            next(iter(loader))  # given up midway


def test_samplers_of_several_ranks_see_all_indices(mixed):
    dataset = mixed()
    samplers = [DistributedSampler(dataset, 2, rank, seed=3) for rank in range(2)]
    assert sorted(i for sampler in samplers for i in sampler) == list(range(24))


def test_one_transform_for_both(augmenter, mixed):
    sizes = []

    def transform(image):
        sizes.append((type(image), image.size))
        return to_tensor(image)

    dataset = mixed(Real(transform), transform=None)
    samples(dataset)
    assert sizes == [(Image.Image, (8, 8))] * 24
    with pytest.raises(InputError, match="has a transform already"):
        dataset.transform = transform
    with pytest.raises(InputError, match="has a transform already"):
        mixed(Real(transform), transform=transform)
    plain = mixed(transform=None)
    assert isinstance(plain[0][0], Image.Image) and isinstance(plain[23][0], Image.Image)
    plain.transform = to_tensor
    assert samples(plain).equal(samples(dataset))


@pytest.mark.parametrize(
    ("real", "classes"),
    [
        (SimpleNamespace(class_to_idx={"lily": 7, "rose": 5}), None),
        (SimpleNamespace(reader=SimpleNamespace(class_to_idx={"lily": 7, "rose": 5})), None),
        (SimpleNamespace(classes=["rose", "lily"]), {"lily": 7, "rose": 5}),
    ],
)
def test_where_the_names_of_labels_are_found(augmenter, real, classes):
    class Sized(SimpleNamespace):
        def __len__(self):
            return 2

    with augmenter.dataset(Sized(**vars(real)), classes=classes) as dataset:
        assert dataset.labels == [7, 5]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"classes": ["daisy", "rose"]}, "Category 'lily' is no class of the real dataset, which has daisy, rose"),
        ({"ratio": 1.0}, "ratio, the share of generated samples, must be above 0 and below 1, got 1.0"),
        ({"cache": 1}, "cache must hold an image of each of the plan's 2 lines, got 1"),
        ({"epochs_per_image": 0}, "epochs_per_image must be at least 1, got 0"),
    ],
)
def test_settings_that_cannot_be(augmenter, settings, message):
    before = len(threads())
    with pytest.raises(InputError, match=message):
        augmenter.dataset(Real(), **settings)
    with pytest.raises(InputError, match="list has neither 'class_to_idx' nor 'classes'; give classes"):
        augmenter.dataset([(0, 0)])
    assert len(threads()) == before


def test_it_stops_when_it_is_closed_left_or_forgotten(augmenter):
    before = len(threads())
    with augmenter.dataset(Real()) as dataset:
        assert len(threads()) == before + 1
        dataset[20]
    dataset.close()
    assert len(threads()) == before
    with pytest.raises(RuntimeError, match="was closed"):
        dataset.set_epoch(1)
    dataset._shown.state[0] = 1
    with pytest.raises(RuntimeError, match="was closed"):
        dataset[20]
    dataset = augmenter.dataset(Real())
    del dataset
    gc.collect()
    assert len(threads()) == before


def test_an_error_of_the_thread_reaches_who_waits(tiny_bundle, tiny_shots, tmp_path):
    shots = shutil.copytree(tiny_shots, tmp_path / "novel")
    augmenter = Augmenter(tiny_bundle, shots)
    shutil.copy(shots / "rose" / "1.png", shots / "lily" / "0.png")
    with augmenter.dataset(Real(), transform=to_tensor) as dataset:
        with pytest.raises(InputError, match="cannot be generated any more: InputError: Shot .* is not the file"):
            samples(dataset)
        with pytest.raises(InputError, match="is not the file"):
            list(DataLoader(dataset, num_workers=1))


def test_a_pickled_copy_draws_the_same_by_itself(mixed):
    dataset = mixed()
    dataset.set_epoch(3)
    for twin in (pickle.loads(pickle.dumps(dataset)), copy.deepcopy(dataset)):
        with twin:
            assert twin.epoch == 3 and samples(twin).equal(samples(dataset))
            assert twin._shown.pixels.data_ptr() != dataset._shown.pixels.data_ptr()


PROGRAM = """
import sys, time, torch
sys.path.insert(0, {tests!r})
from torch.utils.data import DataLoader
from sage_fast.augmenter import Augmenter
from test_mixing import Real, to_tensor
torch.set_num_threads(1)
dataset = Augmenter({bundle!r}, {shots!r}).dataset(Real(), transform=to_tensor)
loader = DataLoader(dataset, num_workers=1, multiprocessing_context="fork", sampler=range(12, 24))
batches = iter(loader)
next(batches)
print(batches._workers[0].pid, flush=True)
if {waits}:
    type(dataset._shown).missing = lambda *_: None  # the thread finds nothing to draw,
    time.sleep(1)  # and has ended what it was at
    dataset._shown.versions.fill_(-1)
    list(batches)
"""


def program(bundle, shots, waits):
    tests = str(Path(__file__).parent)
    return [sys.executable, "-c", PROGRAM.format(tests=tests, bundle=str(bundle), shots=str(shots), waits=waits)]


def test_a_program_that_closes_nothing_ends(tiny_bundle, tiny_shots):
    done = subprocess.run(program(tiny_bundle, tiny_shots, False), capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_worker_that_waits_for_an_image_ends_when_its_process_is_killed(tiny_bundle, tiny_shots):
    with subprocess.Popen(
        program(tiny_bundle, tiny_shots, True), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        worker = int(process.stdout.readline())
        time.sleep(2)
        assert process.poll() is None and is_running(worker)
        os.kill(process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while is_running(worker) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not is_running(worker)


def is_running(number):
    try:
        return Path(f"/proc/{number}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False
