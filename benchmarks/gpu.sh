#!/bin/sh
# On a machine with a CUDA GPU, nvcc and a CUDA build of torch: build, test, sanitize, bench; results under OUT (default gpu_out).
# Under nine minutes. Nothing is downloaded; what cannot run says so in OUT/summary.txt and the rest goes on.
set -u
cd "$(dirname "$0")/.."
OUT=${OUT:-gpu_out}
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"
export PYTHONPATH=$PWD HF_HUB_OFFLINE=1 SAGE_FAST_BUILD=aot TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-8.0;9.0}" MAX_JOBS=${MAX_JOBS:-8}
step() { # name, seconds at most, command...
  name=$1 limit=$2
  shift 2
  start=$(date +%s)
  timeout "$limit" "$@" >"$OUT/$name.log" 2>&1
  code=$?
  echo "$name: exit $code, $(($(date +%s) - start)) s" | tee -a "$OUT/summary.txt"
}
: >"$OUT/summary.txt"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv >"$OUT/gpu.txt" 2>&1
step build 240 $PYTHON setup.py build_ext --inplace
step info 60 $PYTHON -m sage_fast.cli info --json
step registers 60 sh -c 'cuobjdump --dump-resource-usage sage_fast/_ops_cuda*.so'
step tests 150 $PYTHON -m pytest -q -p no:cacheprovider python_tests/ops python_tests/models python_tests/factorization python_tests/editing python_tests/test_fusion.py
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    step "$tool" 60 compute-sanitizer --tool "$tool" --error-exitcode 9 $PYTHON -m pytest -q -p no:cacheprovider python_tests/ops -k "cuda and odd"
  done
else
  echo "sanitizer: compute-sanitizer was not found" | tee -a "$OUT/summary.txt"
fi
for bench in benchmarks/bench_*.py; do
  [ "$bench" = benchmarks/bench_dictionary.py ] && continue # a script of its own, on the CPU
  step "$(basename "$bench" .py)" 60 $PYTHON -m pytest -q -s -p no:cacheprovider "$bench" --benchmark-enable --benchmark-json "$OUT/$(basename "$bench" .py).json"
done
cat "$OUT/summary.txt"
