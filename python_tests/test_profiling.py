"""The profile of a synthesis: every layer, both roads, and the command."""

from __future__ import annotations

import json

import pytest
import torch
from nvlabs_pickles import write_nvlabs

from sage_fast.cli import main
from sage_fast.errors import InputError
from sage_fast.models.stylegan2 import Generator
from sage_fast.profiling import ProfileConfig, profile_synthesis, profile_table

NAMES = ["conv1", "convs.0", "convs.1", "to_rgb1", "to_rgbs.0"]


@pytest.mark.parametrize("gradients", [False, True])
def test_every_layer_is_timed(gradients):
    generator = Generator(8, 8, 1, channels=[12, 6]).requires_grad_(gradients)
    layers, about = profile_synthesis(generator, ProfileConfig(n=2, rounds=2, gradients=gradients))
    assert [layer.name for layer in layers] == NAMES
    assert [layer.size for layer in layers] == [4, 8, 8, 4, 8]
    assert all(0 < layer.seconds < 1 for layer in layers)
    assert layers[1].flop == 2 * 2 * 9 * 12 * 6 * 16  # two images, at half the size
    assert about["road"] == ("differentiable" if gradients else "fused")
    assert sum(layer.seconds for layer in layers) < 2
    table = profile_table(layers, about)
    assert all(name in table for name in NAMES) and about["reason"] in table
    assert "convolution" not in table
    table = profile_table(layers, about | dict(convolutions=["cudnn", "own 64", "own"]))
    assert "convs.0     convolution: own 64" in table


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("connections", ["orig", "resnet"])
def test_networks_with_one_image_at_the_end(connections, gradients):
    generator = Generator(8, 8, 1, channels=[12, 6], connections=connections).requires_grad_(gradients)
    layers, about = profile_synthesis(generator, ProfileConfig(n=2, rounds=2, gradients=gradients))
    assert [layer.name for layer in layers] == ["conv1", "convs.0", "convs.1", "to_rgbs.0"]
    assert all(layer.seconds > 0 for layer in layers) and layers[-1].size == 8
    assert about["road"] == ("fused" if connections == "orig" and not gradients else "differentiable")


def test_the_command_and_its_trace(tmp_path, tiny_bundle, capsys):
    trace = tmp_path / "trace.json"
    assert main(["profile", "--model", str(tiny_bundle), "-n", "1", "--rounds", "1", "--trace", str(trace)]) == 0
    printed = capsys.readouterr().out
    assert "road: fused" in printed and "convs.1" in printed
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"sage_fast::synthesis", *NAMES} <= names


def test_a_published_file(tmp_path, capsys):
    path = write_nvlabs(tmp_path / "ada.pkl", Generator(8, 16, 1, channels=[12, 6]))
    assert main(["profile", "--model", str(path), "-n", "1", "--rounds", "1"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in NAMES) and "12 > 6" in printed


def test_the_trace_of_the_differentiable_road_names_its_layers(tmp_path):
    generator, trace = Generator(8, 8, 1, channels=[12, 6]), tmp_path / "trace.json"
    profile_synthesis(generator, ProfileConfig(n=2, rounds=1, gradients=True), trace)
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event.get("name") in NAMES]
    assert [event["name"] for event in sorted(events, key=lambda event: event["ts"])] == [
        "conv1",
        "to_rgb1",
        "convs.0",
        "convs.1",
        "to_rgbs.0",
    ]


def test_gradients_of_a_model_with_frozen_weights(tiny_bundle, capsys):
    assert main(["profile", "--model", str(tiny_bundle), "-n", "1", "--rounds", "1", "--gradients"]) == 0
    assert "road: differentiable (gradients are recorded)" in capsys.readouterr().out


def test_sizes_beside_a_model_are_refused(tiny_bundle, capsys):
    assert main(["profile", "--model", str(tiny_bundle), "--resolution", "64"]) == 2
    assert "a model has its own resolution and channels; leave out --resolution" in capsys.readouterr().err


def test_threads_are_put_back():
    before = torch.get_num_threads()
    profile_synthesis(
        Generator(4, 8, 1, channels=[8]).requires_grad_(False), ProfileConfig(rounds=1, threads=before + 1)
    )
    assert torch.get_num_threads() == before


def test_bad_settings():
    for name, value in (("rounds", 0), ("threads", 0), ("threads", -1)):
        with pytest.raises(InputError, match=f"{name} must be at least 1, got {value}"):
            ProfileConfig(**{name: value})


def test_a_trace_that_could_not_be_is_refused_at_once(tmp_path, tiny_bundle, capsys):
    for place in (tmp_path, tmp_path / "nodir" / "t.json"):
        assert main(["profile", "--model", str(tiny_bundle), "--trace", str(place)]) == 2
        said = capsys.readouterr()
        assert "trace must be a file in a folder that is there" in said.err and not said.out


def test_a_trace_that_the_profiler_did_not_write_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", lambda *_: None)
    with pytest.raises(OSError):
        profile_synthesis(Generator(4, 8, 1, channels=[8]), ProfileConfig(n=1, rounds=1), tmp_path / "t.json")
    assert not list(tmp_path.iterdir())
