# make demo    set up if needed, then generate, fuse and evaluate with the shipped model
# make test    the same set-up, then every test
# make sanitize    the tests that reach the CPU kernels, and the CUDA kernels on the CPU, under AddressSanitizer and UBSan; needs g++
# make cuda-on-host    every test of the ops through the CUDA kernels, run by the CPU; some minutes
# An active virtual environment is used as it is; otherwise .venv is made, which sees the torch of the system's Python when there
# is one. The torch that is there stays; only where there is none, TORCH is installed.
TORCH ?= torch==2.13.0
EXTRAS ?= test
# as pip knows it: the torch 2.13.0 of the index calls itself 2.13.0+cu130, and pip finds no such version
HERE = "torch==$$($(PYTHON) -c 'from importlib.metadata import version; print(version("torch"))')"
# exact versions: what they ask for differs from one to the next
LINTERS := ruff==0.17.6 mypy==2.4.1 clang-format==23.1.5
empty :=
space := $(empty) $(empty)
BIN := $(if $(VIRTUAL_ENV),$(subst $(space),\$(space),$(VIRTUAL_ENV)),.venv)/bin
PYTHON := $(BIN)/python
STAMP := build/set-up$(subst \$(space),_,$(subst /,_,$(PYTHON)))
SOURCES := $(wildcard csrc/*.* csrc/cpu/*.* csrc/cuda/*.*) setup.py pyproject.toml sage_fast/_build.py

.PHONY: demo test sanitize setup bench lint format cuda-objects cuda-on-host clean

demo: setup
	$(PYTHON) -m sage_fast.demo --out demo_out

# a process a core with one thread each: the tests' tensors are too small for two
# What the optional parts work with is no part of the set-up; where it cannot be had, the tests that need it skip, saying so.
OPTIONAL := 'ray[data]' lightning torchmetrics tensorboard webdataset simplejpeg opencv-python-headless matplotlib
test: setup
	@for library in $(OPTIONAL); do \
	  $(PYTHON) -m pip install --quiet "$$library" $(HERE) || \
	  echo "$$library cannot be installed here."; \
	done
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest --numprocesses auto --dist loadfile

# Objects of their own, in build/sanitize. Python is not instrumented, so the sanitizers' libraries are loaded before it;
# leaks are left to it, which keeps much to its end. Not run: what torch.compile compiles, in
# models/test_stylegan2_compiled.py; that code is not ours, and its compiler would be watched too.
SANITIZE = OMP_NUM_THREADS=1 CXX=g++ SAGE_FAST_SANITIZE=1 SAGE_FAST_BUILD=jit SAGE_FAST_CACHE=build/sanitize
# fresh memory is all NaN: a value that depends on what was never written fails its test
ASAN = detect_leaks=0:max_malloc_fill_size=1000000000:malloc_fill_byte=255
WATCHED = $(SANITIZE) ASAN_OPTIONS=$(ASAN) UBSAN_OPTIONS=print_stacktrace=1 \
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	$(PYTHON) -m pytest --numprocesses auto --dist worksteal -q -p no:cacheprovider
# what reaches kernels through the package: weights, low precision, inversion, training; for the widest instructions alone
THROUGH = $(addprefix python_tests/,models/test_weights.py models/test_low_precision.py test_inversion.py \
	$(addprefix training/test_,augment.py dictionary.py gan.py prior.py resample.py updates.py))
sanitize: setup
	$(SANITIZE) $(PYTHON) -c 'from sage_fast import _build; print(_build.build_cached())'
	$(WATCHED) python_tests/ops python_tests/test_fusion.py python_tests/models/test_stylegan2.py python_tests/editing $(THROUGH)
	SAGE_FAST_ISA=avx512 $(WATCHED) python_tests/ops
	SAGE_FAST_ISA=avx2 $(WATCHED) python_tests/ops
	SAGE_FAST_ISA=portable $(WATCHED) python_tests/ops
	$(WATCHED) python_tests/cuda_on_host

setup: $(STAMP)

ifndef VIRTUAL_ENV
# not there, or a link to a Python that is gone
$(PYTHON):
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "sage_fast needs Python 3.10 or later, found $$(python3 --version)"; exit 1; }
	python3 -m venv --clear $$(python3 -c 'import torch' 2>/dev/null && echo --system-site-packages) .venv
$(STAMP): $(PYTHON)
endif

$(STAMP): $(SOURCES)
	@$(PYTHON) -c 'import pip, sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
	{ echo "The environment of $(PYTHON) has no pip or is older than Python 3.10; delete it, or activate another."; exit 1; }
	$(PYTHON) -c 'import torch' 2>/dev/null || $(PYTHON) -m pip install --quiet "$(TORCH)" numpy
	$(PYTHON) -m pip install --quiet "setuptools>=77" wheel "pybind11>=2.12" ninja $(HERE)
	$(PYTHON) -m pip install --quiet --no-build-isolation --editable ".[$(EXTRAS)]" $(HERE)
	$(PYTHON) -m sage_fast.cli info
	@mkdir -p build && touch $@

# glibc maps and unmaps blocks above 32 MB at every op otherwise, which slows the rivals; PEERS: --peer-path CLONE ...
BENCH = env -u OPENBLAS_CORETYPE MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=4294967296 MALLOC_TOP_PAD_=268435456 $(PYTHON)
bench: setup
	$(BENCH) benchmarks/bench_dictionary.py
	$(BENCH) benchmarks/bench_inversion.py --threads 1 --steps 100
	OPENBLAS_NUM_THREADS=1 $(PYTHON) benchmarks/bench_generate.py
	$(BENCH) -m pytest benchmarks --benchmark-enable --bench-compile $(PEERS)

FORMATTED := csrc/*.cpp csrc/*.h csrc/cpu/* csrc/cuda/* python_tests/cuda_on_host/*.c* python_tests/cuda_on_host/include/*
lint: setup
	$(PYTHON) -m pip install --quiet $(LINTERS)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(BIN)/clang-format --dry-run --Werror $(FORMATTED)

format:
	$(PYTHON) -m ruff check --fix . ; $(PYTHON) -m ruff format . ; $(BIN)/clang-format -i $(FORMATTED)

# every .cu to an object for sm_80 and sm_90; needs nvcc, no GPU and no CUDA build of torch
cuda-objects: setup
	$(PYTHON) -m pytest python_tests/test_build.py -k cuda

cuda-on-host: setup
	OMP_NUM_THREADS=1 SAGE_FAST_CUDA_ON_HOST=1 $(PYTHON) -m pytest --numprocesses auto -q python_tests/cuda_on_host python_tests/ops -k cuda_on_host

clean:
	rm -rf build sage_fast/*.so sage_fast/_build_info.json
