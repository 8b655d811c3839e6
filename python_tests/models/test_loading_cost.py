"""What loading costs a fresh process, beside reading the file: in time and in memory."""

from __future__ import annotations

import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from nvlabs_pickles import write_nvlabs
from tiny_model import tiny_codes, tiny_encoder, tiny_networks

from sage_fast.factorization.category_irrelevant import layer_groups
from sage_fast.models import spans
from sage_fast.models.published import published_discriminator, published_generator, read_published
from sage_fast.models.stylegan2 import Discriminator, Generator
from sage_fast.models.weights import save_bundle

SCRIPT = """
import resource, sys, time
from sage_fast import load_generator
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
kept = open(sys.argv[1], "rb").read() if sys.argv[2] == "read" else load_generator(sys.argv[1])
print(time.perf_counter() - start, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def free_memory() -> int:
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text().splitlines() if meminfo.exists() else []
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))


def fresh(path: Path, what: str) -> tuple[float, float]:
    """Seconds, and bytes of memory at the peak, of reading or loading a file first thing in a process."""
    done = subprocess.run([sys.executable, "-c", SCRIPT, path, what], capture_output=True, text=True, check=True)
    seconds, peak = done.stdout.split()
    return float(seconds), float(peak)


@pytest.mark.skipif(free_memory() < 3 << 30, reason="less than 3 GB of memory are free, or nothing tells")
def test_a_generator_of_1024_px_in_a_fresh_process(tmp_path):
    path = write_nvlabs(tmp_path / "x.pkl", Generator(1024), Discriminator(1024))
    path.read_bytes()
    runs = [(fresh(path, "load"), fresh(path, "read")) for _ in range(5)]
    loading, reading = (statistics.median(seconds) for seconds in zip(*[(a[0], b[0]) for a, b in runs]))
    assert loading < 2 * reading, runs
    assert max(load[1] for load, _ in runs) < 2.2 * path.stat().st_size


def test_only_the_network_asked_for_is_read(tmp_path, monkeypatch):
    read = []
    fill = spans.Budget.__init__

    def watched(self, size):
        fill(self, size)
        self.unread = Watched()

    class Watched(dict):
        def items(self):
            return [(address, partial(self.run, step)) for address, step in super().items()]

        def run(self, step):
            read.append(step)
            step()

    monkeypatch.setattr(spans.Budget, "__init__", watched)
    G, D = Generator(8, 8, n_mapping=1, channels=[4, 6]), Discriminator(8, channels=[4, 6])
    path = write_nvlabs(tmp_path / "x.pkl", G, D)
    torch.save({"g": G.state_dict(), "g_ema": G.state_dict(), "d": D.state_dict(), "g_optim": {}}, tmp_path / "x.pt")
    for file in (path, tmp_path / "x.pt"):
        counts = []
        for load in (read_published, published_generator, published_discriminator):
            read.clear()
            load(file)
            counts.append(len(read))
        assert counts[1] + counts[2] <= counts[0] and min(counts) > 0
        assert torch.equal(published_generator(file).input.input, G.input.input)


def test_no_encoder_of_a_bundle_imports_torchs_compiler(tmp_path):
    generator, _, discriminator = tiny_networks()
    codes, directions = tiny_codes(generator.n_latent)
    kinds = ("psp", "restyle", "hyperstyle")
    for kind in kinds:
        save_bundle(
            tmp_path / kind, generator=generator, encoder=tiny_encoder(kind, generator), directions=directions,
            groups=layer_groups(generator.n_latent), codes=codes, discriminator=discriminator, about={},
        )  # fmt: skip
    program = (
        "import sys; from sage_fast import load_bundle; [load_bundle(p) for p in sys.argv[1:]]; print(*sys.modules)"
    )
    command = [sys.executable, "-c", program, *(tmp_path / kind for kind in kinds)]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert "sage_fast.models.hypernets" in loaded and not {"torch._dynamo", "sympy"} & set(loaded)
