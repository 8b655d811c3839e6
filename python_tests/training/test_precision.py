"""bfloat16 where a device multiplies it, float32 where not, and one line that says so."""

from __future__ import annotations

import dataclasses

import pytest
import tiny_training
import torch

from sage_fast.training import precision
from sage_fast.training.runtime import Run


@pytest.fixture
def emulated_bfloat16(monkeypatch):
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda device_type: False)


def product(name):
    x = torch.ones(2, 2)
    with precision.autocast(name, "cpu"):
        return (x @ x).dtype


def test_autocast(multiplied_bfloat16):
    assert product("float32") == torch.float32 and product("bfloat16") == torch.bfloat16
    assert precision.substitution("bfloat16", "cpu") is None


def test_float32_instead(emulated_bfloat16):
    assert product("float32") == product("bfloat16") == torch.float32
    assert precision.substitution("float32", "cpu") is None
    assert "this processor does not multiply bfloat16" in precision.substitution("bfloat16", "cpu")
    assert "this GPU does not" in precision.substitution("bfloat16", "cuda:1")


def test_the_same_bits_as_float32(emulated_bfloat16, tmp_path, capsys):
    low = dataclasses.replace(tiny_training.GAN, precision="bfloat16", total_kimg=0.012)
    weights = tiny_training.train("gan", tmp_path / "low", low)
    assert capsys.readouterr().out.count("Stage 'gan': this processor does not multiply bfloat16") == 1
    expected = tiny_training.train("gan", tmp_path / "high", dataclasses.replace(low, precision="float32"))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert "multiply" not in capsys.readouterr().out


def test_a_remedy_that_would_change_nothing_is_not_proposed(emulated_bfloat16, tmp_path):
    run = Run(tmp_path, "gan", dataclasses.replace(tiny_training.GAN, precision="bfloat16"))
    assert "float32" not in run.remedy()


def test_what_devices_multiply(monkeypatch):
    asked = precision.multiplies_bfloat16.__wrapped__
    for features, answer in (
        ({"avx2": True, "avx512_bf16": False}, False),
        ({"avx512_bf16": True}, True),
        ({"amx_bf16": True}, True),
        ({"neon": True, "bf16": True}, True),
        ({}, False),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=features: found)
        assert asked("cpu") is answer
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    assert asked("cuda") is False
