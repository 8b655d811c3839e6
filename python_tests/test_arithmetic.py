"""bfloat16 where a device multiplies it, float32 where not, and one line that says so."""

from __future__ import annotations

import dataclasses
import os
import threading

import pytest
import tiny_training
import torch

from sage_fast import arithmetic
from sage_fast.errors import InputError
from sage_fast.training.runtime import Run


@pytest.fixture
def emulated_bfloat16(monkeypatch):
    monkeypatch.setattr(arithmetic, "multiplies_bfloat16", lambda device_type: False)


def product(name):
    x = torch.ones(2, 2)
    with arithmetic.autocast(name, "cpu"):
        return (x @ x).dtype


def test_autocast(multiplied_bfloat16):
    assert product("float32") == torch.float32 and product("bfloat16") == torch.bfloat16
    assert arithmetic.substitution("bfloat16", "cpu") is None


def test_float32_instead(emulated_bfloat16):
    assert product("float32") == product("bfloat16") == torch.float32
    assert arithmetic.substitution("float32", "cpu") is None
    assert "this processor does not multiply bfloat16" in arithmetic.substitution("bfloat16", "cpu")
    assert "this GPU does not" in arithmetic.substitution("bfloat16", "cuda:1")


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
    asked = arithmetic.multiplies_bfloat16.__wrapped__
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


def settings():
    b = torch.backends
    return [part.fp32_precision for part in (b.cuda.matmul, b.cudnn.conv, b.mkldnn.matmul, b.mkldnn.conv)]


@pytest.fixture(params=["usual", "medium", "newer words"])
def as_set(request):
    """PyTorch's settings of float32 products as a program may have set them; afterwards as they were."""
    before = arithmetic._read_products()
    if request.param == "medium":
        torch.set_float32_matmul_precision("medium")
    elif request.param == "newer words":
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        torch.backends.cudnn.conv.fp32_precision = "ieee"
    yield settings()
    arithmetic._write_products(before)
    assert arithmetic._read_products() == before


@pytest.mark.parametrize(
    ("precision", "inside"),
    [("float32", ["ieee"] * 4), ("bfloat16", ["ieee"] * 4), ("tf32", ["tf32"] * 2 + ["ieee"] * 2)],
)
def test_products_of_float32(as_set, precision, inside):
    with arithmetic.float32_products(precision):
        assert settings() == inside
        if as_set[0] != "tf32" or as_set[1] != "ieee":  # older words that contradict newer ones cannot be asked
            assert torch.backends.cudnn.allow_tf32 == torch.backends.cuda.matmul.allow_tf32 == (precision == "tf32")
            assert torch.get_float32_matmul_precision() == ("high" if precision == "tf32" else "highest")
        torch.ones(4, 4) @ torch.ones(4, 4)
    assert settings() == as_set


def test_products_are_set_back_by_the_last(as_set):
    first, second = arithmetic.float32_products(), arithmetic.float32_products("bfloat16")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert settings() == ["ieee"] * 4
    with pytest.raises(InputError, match="in this process has set the precision of products otherwise"):
        arithmetic.float32_products("tf32").__enter__()
    second.__exit__(None, None, None)
    assert settings() == as_set


def test_a_setting_of_all_products_is_followed_again():
    before = arithmetic._read_products()
    try:
        torch.backends.fp32_precision = "tf32"
        with arithmetic.float32_products():
            assert settings() == ["ieee"] * 4
        assert settings() == ["tf32"] * 4
        torch.backends.fp32_precision = "ieee"
        assert settings() == ["ieee"] * 4
    finally:
        torch.backends.fp32_precision = "none"
        arithmetic._write_products(before)
    assert arithmetic._read_products() == before


def test_each_thread_has_one_and_gets_its_own_number_back():
    """PyTorch's number of threads is each thread's own: one that came second computed on two, and the first stayed with one."""
    inside, left, found = threading.Event(), threading.Event(), {}

    def first():
        torch.set_num_threads(2)
        with arithmetic.one_thread():
            began.start()
            assert inside.wait(60)
        found["first"] = torch.get_num_threads()
        left.set()

    def second():  # begins where the first has set one
        with arithmetic.one_thread():
            inside.set()
            assert left.wait(60)
            found["inside"] = torch.get_num_threads()
        found["second"] = torch.get_num_threads()

    def third():
        torch.set_num_threads(2)
        torch.ones(2, 2) @ torch.ones(2, 2)
        ready.set()
        assert entered.wait(60)
        with arithmetic.one_thread():
            found["third"] = torch.get_num_threads()
        done.set()

    began, before = threading.Thread(target=second), torch.get_num_threads()
    opener = threading.Thread(target=first)
    opener.start()
    opener.join(60)
    began.join(60)
    ready, entered, done = threading.Event(), threading.Event(), threading.Event()
    late = threading.Thread(target=third)
    late.start()
    assert ready.wait(60)
    with arithmetic.one_thread():
        entered.set()
        assert done.wait(60)
    late.join(60)
    torch.set_num_threads(before)
    assert found == {"first": 2, "inside": 1, "second": 2, "third": 1}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_that_is_forked_inside_leaves_too():
    before = arithmetic._read_products()
    with arithmetic.float32_products(), arithmetic.one_thread():
        child = os.fork()
    if child == 0:
        os._exit(arithmetic._read_products() != before or bool(arithmetic._with_products or arithmetic._with_one))
    assert os.waitpid(child, 0)[1] == 0
