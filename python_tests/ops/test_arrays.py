"""Ops on NumPy arrays and on whatever has DLPack: the numbers of the tensors, in the kind that was given, without copies."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import threading
import time
import tracemalloc

import numpy as np
import pytest
import torch

from sage_fast import _native, info, ops
from sage_fast.errors import InputError

FLOATS = ("float32", "float64")


def numbers(*shape: int, dtype: str = "float32", seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def images(n: int, *size: int, dtype: str = "float32"):
    return [numbers(count, *size, dtype=dtype, seed=i).clip(-1, 1) for i, count in enumerate((1, n, n))]


def calls(dtype: str) -> dict[str, tuple]:
    """name -> (op, arrays by name, settings), at odd sizes where the ops take their kernels."""
    x = numbers(2, 3, 13, 17, dtype=dtype)
    f = numbers(4, dtype=dtype)
    w, basis = numbers(33, 5, 130, dtype=dtype), numbers(5, 130, 7, dtype=dtype)
    codes = numbers(33, 5, 7, dtype=dtype)
    mask = numbers(3, 5, 7) > 0
    index = np.arange(33) % 3
    real, inverted, edited = images(3, 3, 13, 17, dtype=dtype)
    fused = {"real": real, "inverted": inverted, "edited": edited}
    edit = {"class_embedding": w[:3], "codes": codes, "directions": basis}
    return {
        "upfirdn2d": (ops.upfirdn2d, {"x": x, "f": f}, {"up": 2, "down": 3, "padding": (2, 1, -1, 4), "gain": 2.0}),
        "upfirdn2d_2d": (ops.upfirdn2d, {"x": x, "f": numbers(3, 5)}, {"padding": 3, "flip_filter": True}),
        "bias_act": (ops.bias_act, {"x": x, "b": numbers(3, dtype=dtype)}, {"act": "lrelu", "clamp": 1.5}),
        "bias_act_last": (ops.bias_act, {"x": x, "b": numbers(17, dtype=dtype)}, {"act": "relu", "dim": -1}),
        "bias_act_tanh": (ops.bias_act, {"x": x, "b": None}, {"act": "tanh"}),
        "bias_act_sigmoid": (ops.bias_act, {"x": x}, {"act": "sigmoid"}),
        "bias_act_swish": (ops.bias_act, {"x": x, "b": numbers(3, dtype=dtype)}, {"act": "swish", "clamp": 1.5}),
        "bias_act_linear": (ops.bias_act, {"x": x, "b": numbers(3, dtype=dtype)}, {"gain": 2.0}),
        "bias_act_as_it_is": (ops.bias_act, {"x": x}, {}),
        "project_onto_basis": (ops.project_onto_basis, {"w_plus": w, "basis": basis}, {}),
        "project_onto_basis_one": (
            ops.project_onto_basis,
            {"w_plus": numbers(1, 18, 512), "basis": numbers(18, 512, 8)},
            {},
        ),
        "project_onto_basis_wide": (
            ops.project_onto_basis,
            {"w_plus": w[:, :, :9], "basis": np.repeat(basis[:, :9], 9, 2)},
            {},
        ),
        "least_squares_codes": (ops.least_squares_codes, {"delta_w": w, "pseudo_inverse": basis.swapaxes(1, 2)}, {}),
        "edit_latents": (ops.edit_latents, {**edit, "mask": mask, "class_index": index}, {"alpha": 0.7}),
        "edit_latents_shared": (ops.edit_latents, {**edit, "class_embedding": w[:1], "mask": mask[0].astype(int)}, {}),
        "edit_latents_small": (ops.edit_latents, {k: v[:1] if k != "directions" else v for k, v in edit.items()}, {}),
        "gaussian_low_pass": (ops.gaussian_low_pass, {"images": x}, {"sigma": 2.0}),
        "gaussian_low_pass_pixels": (
            ops.gaussian_low_pass,
            {"images": x},
            {"sigma": 2.0, "border": "reflect", "unit": "pixels"},
        ),
        "gaussian_low_pass_inf": (ops.gaussian_low_pass, {"images": x}, {"sigma": float("inf")}),
        "fuse_frequencies": (ops.fuse_frequencies, fused, {"gamma1": 0.9, "sigma": 2.0}),
        "fuse_frequencies_one_source": (ops.fuse_frequencies, {**fused, "inverted": inverted[:1]}, {}),
        "fuse_pixels": (ops.fuse_pixels, fused, {"beta": 0.4, "blend": "convex"}),
        "fuse_pixels_low": (ops.fuse_pixels, {**fused, "low": edited[:1] / 2}, {}),
    }


def on_tensors(op, arrays, settings):
    tensors = {name: None if a is None else torch.from_numpy(np.ascontiguousarray(a)) for name, a in arrays.items()}
    return op(**tensors, **settings).numpy()


def apart(array):
    """The same values, not contiguous."""
    wide = np.zeros((*array.shape, 2), array.dtype)
    wide[..., 0] = array
    return wide[..., 0]


@pytest.fixture
def host():
    found = _native.host()
    if found is None:
        pytest.skip(f"no host module: {_native.load().reasons}")
    return found


@pytest.fixture
def threads(host):
    before = host.num_threads()
    yield host.set_num_threads
    host.set_num_threads(before)


@pytest.mark.parametrize("name", calls("float32"))
@pytest.mark.parametrize("dtype", FLOATS)
def test_arrays_give_the_bits_of_tensors(name, dtype):
    op, arrays, settings = calls(dtype)[name]
    expected = on_tensors(op, arrays, settings)
    got = op(**arrays, **settings)
    assert type(got) is np.ndarray and got.dtype == expected.dtype
    np.testing.assert_array_equal(got, expected)
    strided = {key: None if a is None else apart(a) for key, a in arrays.items()}
    np.testing.assert_array_equal(op(**strided, **settings), expected)
    for array in (a for a in arrays.values() if a is not None):
        array.flags.writeable = False  # nothing writes to what it reads
    np.testing.assert_array_equal(op(**arrays, **settings), expected)


@pytest.mark.parametrize("act", ["lrelu", "tanh", "softplus"])
def test_half_precision(act):
    x, b, f = numbers(2, 3, 8, 9, dtype="float16"), numbers(3), numbers(4)
    for op, arrays, settings in (
        (ops.bias_act, {"x": x, "b": b}, {"act": act}),
        (ops.upfirdn2d, {"x": x, "f": f}, {"up": 2, "padding": 2}),
    ):
        np.testing.assert_array_equal(op(**arrays, **settings), on_tensors(op, arrays, settings))


def test_bits_do_not_depend_on_threads(threads):
    for name, (op, arrays, settings) in calls("float32").items():
        arrays = {k: np.concatenate([a] * 9) if k in ("x", "images") else a for k, a in arrays.items()}
        found = []
        for n in (1, 2, 5):
            threads(n)
            found.append(op(**arrays, **settings))
        assert all(np.array_equal(found[0], other) for other in found[1:]), name


def test_empty_arrays():
    for name, (op, arrays, settings) in calls("float32").items():
        if "class_index" in arrays:
            arrays = {**arrays, "class_index": arrays["class_index"][:0]}
        none = {
            k: a[:0] if k in ("x", "w_plus", "delta_w", "codes", "images", "edited") else a for k, a in arrays.items()
        }
        if "edited" in none:
            none |= {k: a[:1] for k, a in none.items() if k != "edited"}
        got = op(**none, **settings)
        assert got.shape == on_tensors(op, none, settings).shape and got.size == 0, name


def test_the_kernels_are_those_of_the_host_module(host, monkeypatch):
    """Where a tensor would meet a kernel, an array does not pass through torch."""
    through_torch = []
    monkeypatch.setattr(
        "sage_fast.ops._arrays._tensor", lambda name, a: through_torch.append(name) or torch.from_numpy(a)
    )
    for name, (op, arrays, settings) in calls("float32").items():
        through_torch.clear()
        op(**arrays, **settings)
        other_road = name in ("bias_act_as_it_is", "project_onto_basis_wide", "gaussian_low_pass_inf")
        assert bool(through_torch) == other_road, name


def test_out_is_written_and_returned(host):
    x, b = numbers(2, 3, 8, 8), numbers(3)
    out = np.empty_like(x)
    assert host.gaussian_low_pass(x, 2.0, out=out) is out
    np.testing.assert_array_equal(out, ops.gaussian_low_pass(x, 2.0))
    expected, inside = host.bias_act(x, b), x.copy()
    assert host.bias_act(inside, b, out=inside) is inside  # in place
    np.testing.assert_array_equal(inside, expected)
    for bad, what in (
        (np.empty((2, 3, 8, 7), "f4"), r"out must have shape \[2, 3, 8, 8\], got \[2, 3, 8, 7\]"),
        (np.empty((2, 3, 8, 8), "f8"), "out must be float32, got float64"),
        (apart(x), "out must be C-contiguous"),
        (x, "out must not overlap images"),
    ):
        with pytest.raises(ValueError, match=what):
            host.gaussian_low_pass(x, 2.0, out=bad)


def test_inputs_are_read_in_place(host):
    x = np.zeros((4, 3, 512, 512), np.float32)
    out = np.empty_like(x)
    tracemalloc.start()
    host.gaussian_low_pass(x, 5.0, out=out)
    host.bias_act(x, np.zeros(3, np.float32), out=out)
    host.upfirdn2d(x, np.ones(4, np.float32), padding=(2, 1, 2, 1), out=out)
    assert tracemalloc.get_traced_memory()[1] < x.nbytes / 100
    ops.bias_act(x, act="lrelu")
    assert tracemalloc.get_traced_memory()[1] < 1.01 * x.nbytes  # the result, and no copy
    tracemalloc.stop()


def test_python_goes_on_meanwhile(host, threads):
    """One call of the C++ function, long enough for the interpreter to hand the GIL over many times, were it held."""
    threads(1)
    x, done, ticks = np.zeros((8, 16, 512, 512), np.float32), threading.Event(), []
    out = np.empty_like(x)

    def work():
        for _ in range(3):
            host.gaussian_low_pass(x, 5.0, out=out)
        done.set()

    worker = threading.Thread(target=work)
    worker.start()
    while not done.is_set():
        ticks.append(time.perf_counter())
        time.sleep(0.001)
    worker.join()
    assert len(ticks) > 20, f"{len(ticks)} steps of Python while the kernels ran"


def test_threads_can_call_at_once(threads):
    threads(3)
    x = numbers(16, 3, 64, 64)
    expected, found = ops.gaussian_low_pass(x), [None] * 8
    workers = [threading.Thread(target=lambda i=i: found.__setitem__(i, ops.gaussian_low_pass(x))) for i in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(np.array_equal(expected, other) for other in found)


def test_number_of_threads(host, threads):
    threads(3)
    assert host.num_threads() == 3
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        threads(0)
    script = "from sage_fast import _native; print(_native.host().num_threads())"
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    assert subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True).stdout == "1\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this machine")
def test_a_forked_process_has_threads_of_its_own():
    script = """
import os, numpy as np
from sage_fast import _native
host = _native.host()
host.set_num_threads(3)
x = np.ones((32, 3, 64, 64), np.float32)
host.gaussian_low_pass(x)
child = os.fork()
if child == 0:
    host.gaussian_low_pass(x)
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    if _native.host() is None:
        pytest.skip("no host module")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "7\n"), done.stderr


class Lent:
    """An array of a library that offers nothing but DLPack."""

    def __init__(self, tensor):
        self.tensor = tensor

    def __dlpack__(self, **settings):
        return self.tensor.__dlpack__(**settings)

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()


class LentAndTaken(Lent):
    """One whose library takes DLPack too."""

    def __array_namespace__(self):
        return type("library", (), {"from_dlpack": lambda given: LentAndTaken(torch.from_dlpack(given))})


def test_dlpack_goes_round():
    for name, (op, arrays, settings) in calls("float32").items():
        expected = on_tensors(op, arrays, settings)
        tensors = {k: None if a is None else torch.from_numpy(np.ascontiguousarray(a)) for k, a in arrays.items()}
        for kind in (Lent, LentAndTaken):
            got = op(**{k: None if t is None else kind(t) for k, t in tensors.items()}, **settings)
            assert isinstance(got, LentAndTaken if kind is LentAndTaken else torch.Tensor), name
            values = got.tensor if kind is LentAndTaken else got
            np.testing.assert_array_equal(values.numpy(), expected, err_msg=name)


def test_cupy_goes_round():
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    try:
        cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        pytest.skip(f"CuPy finds no device: {error}")
    for name, (op, arrays, settings) in calls("float32").items():
        got = op(**{k: None if a is None else cupy.asarray(a) for k, a in arrays.items()}, **settings)
        assert isinstance(got, cupy.ndarray), name
        np.testing.assert_allclose(cupy.asnumpy(got), on_tensors(op, arrays, settings), rtol=1e-4, atol=1e-5)


def test_mixed_kinds_are_named():
    x, f = numbers(1, 1, 4, 4), numbers(2)
    with pytest.raises(InputError, match="f must be a torch.Tensor, as x is, got a numpy.ndarray; convert"):
        ops.upfirdn2d(torch.from_numpy(x), f)
    with pytest.raises(InputError, match="b must be a numpy.ndarray, as x is, got a torch.Tensor"):
        ops.bias_act(x, b=torch.zeros(1))
    with pytest.raises(InputError, match="f must be a numpy.ndarray, as x is, got a builtins.list"):
        ops.upfirdn2d(x, [1.0, 2.0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.upfirdn2d(numbers(3, 4), numbers(2)), r"x must be floating point images \[N, C, H, W\]"),
        (lambda: ops.upfirdn2d(numbers(1, 1, 4, 4), numbers(9)), r"padding \[0, 0, 0, 0\] leaves images of 4 x 4 px"),
        (lambda: ops.upfirdn2d(numbers(1, 1, 4, 4), numbers(2), padding="x"), "padding must be one integer"),
        (lambda: ops.bias_act(numbers(2, 3), numbers(4), act="relu"), r"b must have shape \[3\]"),
        (lambda: ops.bias_act(numbers(2, 3), act="nothing"), "act must be one of"),
        (lambda: ops.bias_act(np.zeros((2, 3), int), act="relu"), "x must be floating point, got torch.int64"),
        (lambda: ops.project_onto_basis(numbers(9, 5, 300), numbers(5, 299, 9)), r"basis must have shape \[L, D, R\]"),
        (lambda: ops.gaussian_low_pass(numbers(1, 1, 4, 4), sigma=-1), "sigma must be positive"),
        (
            lambda: ops.gaussian_low_pass(numbers(1, 1, 4, 4).astype(">f4")),
            "images must be an array that torch can take",
        ),
        (lambda: ops.fuse_pixels(*images(2, 1, 4, 4), blend="no"), "blend must be one of"),
        (lambda: ops.fuse_pixels(*images(2, 1, 4, 4), blend=np.array([1, 2])), "blend must be one of"),
        (lambda: ops.gaussian_low_pass(numbers(1, 1, 4, 4), border=np.array([1, 2])), "border must be one of"),
        (lambda: ops.gaussian_low_pass(numbers(1, 1, 4, 4), torch.ones(2)), "sigma must be a number"),
        (lambda: ops.bias_act(numbers(2, 3), clamp=torch.ones(2), act="relu"), "clamp must be a number"),
        (lambda: ops.bias_act(numbers(2, 3, 4, 5), numbers(3), dim=np.float32(1.9), act="relu"), "dim"),
        (lambda: ops.upfirdn2d(numbers(1, 1, 4, 4), numbers(2), up=np.float32(1.7)), "up must be a positive integer"),
        (lambda: ops.upfirdn2d(numbers(1, 1, 4, 4), numbers(2), down=np.array(1.7)), "down must be a positive integer"),
        (
            lambda: ops.upfirdn2d(numbers(1, 1, 4, 4), numbers(2), padding=np.float32(1.9)),
            "padding must be one integer",
        ),
        (lambda: ops.upfirdn2d(numbers(1, 1, 4, 4), numbers(2), padding=(1, 0, 0, 0.5)), "padding must be one integer"),
        (lambda: ops.upfirdn2d(numbers(1, 1, 4, 4), numbers(2), flip_filter=None), "flip_filter must be True or False"),
        (
            lambda: ops.edit_latents(
                numbers(2, 3, 20), numbers(2, 3, 4), numbers(3, 20, 4), 1.0, np.ones((1, 3, 4), bool)
            ),
            r"mask must have shape \[3, 4\] or \[2, 3, 4\]",
        ),
        (lambda: ops.fuse_frequencies(*images(2, 1, 4, 4)[:2], numbers(2, 1, 4, 5)), "real must have shape"),
    ],
)
def test_ops_name_the_argument(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_the_host_module_names_the_argument(host):
    x, w, a = numbers(2, 3, 8, 8), numbers(4, 5, 6), numbers(5, 6, 7)
    codes, index = numbers(4, 5, 7), np.zeros(4, np.int64)
    for call, message in (
        (lambda: host.upfirdn2d(x[0], numbers(2)), r"x must have shape \[N, C, H, W\], got \[3, 8, 8\]"),
        (lambda: host.upfirdn2d(x.astype(int), numbers(2)), "x must be float32, float64 or float16, got int64"),
        (lambda: host.upfirdn2d(x, numbers(33)), r"f must have shape \[k\] or \[kh, kw\] .*, got \[33\]"),
        (lambda: host.upfirdn2d(x, numbers(2), down=0), "down must be a positive integer, got 0"),
        (lambda: host.upfirdn2d(x, numbers(2), padding=(-4, -4, 0, 0)), r"padding must .*, got \[8, 0\]"),
        (lambda: host.bias_act(x, numbers(4)), r"b must have shape .* = \[3\], got \[4\]"),
        (lambda: host.bias_act(x, numbers(3), dim=4), "dim must be an axis of x"),
        (lambda: host.bias_act(x, act=9), "act must be 0 to 6, got 9"),
        (lambda: host.bias_act(x.astype("f8"), act=1), "x must be float32 or float16 for this act, got float64"),
        (lambda: host.bias_act(x, gain=-1.0), "gain must be positive"),
        (
            lambda: host.project_onto_basis(w, a[:4]),
            r"basis must have shape \[L, D, R\] = \[5, 6, 7\], got \[4, 6, 7\]",
        ),
        (lambda: host.project_onto_basis(w, a.astype("f8")), "basis must be float32, as w_plus is, got float64"),
        (
            lambda: host.least_squares_codes(w, a),
            r"pseudo_inverse must have shape \[L, K, D\] = \[5, 6, 6\], got \[5, 6, 7\]",
        ),
        (
            lambda: host.least_squares_codes(w.astype("f8"), a[..., :6]),
            "pseudo_inverse must be float64, as delta_w is, got float32",
        ),
        (lambda: host.edit_latents(w[:2], codes, a), "class_embedding must hold 1 or N = 4 rows .*, got 2"),
        (lambda: host.edit_latents(w, codes, a, class_index=index + 4), "class_index must be 0 to B - 1 = 3, got 4"),
        (
            lambda: host.edit_latents(w, codes, a, class_index=index.astype("i4")),
            "class_index must be int64, got int32",
        ),
        (lambda: host.edit_latents(w, codes, a, mask=np.ones((2, 5, 7), bool)), "mask must have shape"),
        (lambda: host.gaussian_low_pass(x, 0.0), "sigma must be positive and finite"),
        (lambda: host.fuse_frequencies(x, x[:, :2], x), "inverted must have shape"),
        (lambda: host.fuse_pixels(x, x, x, low=x.astype("f8")), "low must be float32, as edited is"),
        (lambda: host.fuse_pixels(x, x, x, blend=3), "blend must be 0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_without_compiled_objects_arrays_go_through_torch():
    script = """
import numpy as np
from sage_fast import _native, ops
assert _native.host() is None
x = np.ones((1, 1, 4, 4), np.float32)
x.flags.writeable = False
print(type(ops.gaussian_low_pass(x)).__name__, ops.bias_act(x, -2 * np.ones(1), act="relu", gain=1.0).sum())
"""
    env = {**os.environ, "SAGE_FAST_BUILD": "none"}
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], env=env, capture_output=True, text=True)
    assert done.stdout.split() == ["ndarray", "0.0"], done.stderr


def test_ops_stay_what_they_were():
    assert list(inspect.signature(ops.upfirdn2d).parameters)[:3] == ["x", "f", "up"]
    assert ops.bias_act.__doc__ is not None and ops.bias_act.__module__ == "sage_fast.ops.bias_act"
    with pytest.raises(TypeError):
        ops.upfirdn2d(numbers(1, 1, 4, 4), numbers(2), 1, nothing=2)


def test_info_lists_the_functions(host):
    functions = info.build_report()["host"]["functions"]
    assert set(functions) == {
        "upfirdn2d",
        "bias_act",
        "project_onto_basis",
        "least_squares_codes",
        "edit_latents",
        "gaussian_low_pass",
        "fuse_frequencies",
        "fuse_pixels",
    }


def test_an_op_that_changes_nothing_gives_an_array_of_its_own():
    x = numbers(2, 3)
    y = ops.bias_act(x)
    assert np.array_equal(x, y) and not np.shares_memory(x, y)


class OnGpu(Lent):
    """As a CuPy array where torch is a build for the CPU."""

    def __dlpack_device__(self):
        return (2, 0)


class HalfAnArray:
    def __dlpack__(self, **settings):
        raise NotImplementedError("nothing is\nlent.")


def test_arrays_that_torch_cannot_take_are_named():
    x = torch.rand(1, 3, 8, 8)
    given = [HalfAnArray(), Lent(x.clone().requires_grad_())]
    if not torch.cuda.is_available():
        given.append(OnGpu(x))
    for array in given:
        with pytest.raises(
            InputError, match=rf"^images must be an array that torch can take, got .*{type(array).__name__}: \S"
        ):
            ops.gaussian_low_pass(array)
