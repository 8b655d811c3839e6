#!/bin/sh
# On a machine with a CUDA GPU, nvcc and a CUDA build of torch: build, test, bench, sanitize; results under OUT (default gpu_out).
# Under nine minutes in all, the steps of most value first: a step gets its own limit or what is left, whichever is less, and is
# interrupted (not killed) at it, so that it still reports. Nothing is downloaded; what cannot run says so in OUT/summary.txt.
set -u
cd "$(dirname "$0")/.."
OUT=${OUT:-gpu_out}
PYTHON=${PYTHON:-python3}
SECONDS_IN_ALL=${SECONDS_IN_ALL:-510}
mkdir -p "$OUT"
export PYTHONPATH=$PWD HF_HUB_OFFLINE=1 SAGE_FAST_BUILD=aot TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-8.0;9.0}" MAX_JOBS=${MAX_JOBS:-16}
export PYTHONUNBUFFERED=1
begin=$(date +%s)
step() { # name, seconds at most, command...
  name=$1 limit=$2
  shift 2
  start=$(date +%s)
  left=$((SECONDS_IN_ALL - start + begin))
  [ "$left" -lt "$limit" ] && limit=$left
  if [ "$limit" -lt 10 ]; then
    echo "$name: not started, no time left" | tee -a "$OUT/summary.txt"
    return
  fi
  timeout -s INT -k 10 "$limit" "$@" >"$OUT/$name.log" 2>&1
  code=$?
  echo "$name: exit $code, $(($(date +%s) - start)) s" | tee -a "$OUT/summary.txt"
}
TESTS="$PYTHON -m pytest -q -p no:cacheprovider"
: >"$OUT/summary.txt"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv >"$OUT/gpu.txt" 2>&1
step build 200 $PYTHON setup.py build_ext --inplace
step info 30 $PYTHON -c 'import json; from sage_fast.info import build_report; print(json.dumps(build_report()))'
step tests_synthesis 90 $TESTS -k cuda python_tests/ops/test_synthesis.py python_tests/ops/test_synthesis_epilogue.py python_tests/ops/test_styled_conv.py python_tests/ops/test_counter_normal.py python_tests/models/test_graphs.py
step bench_convolutions 40 $TESTS -s benchmarks/bench_synthesis.py -k convolutions_on_a_gpu --benchmark-enable
grep '^{"layer"' "$OUT/bench_convolutions.log" >"$OUT/convolutions_gpu.jsonl" 2>/dev/null
step bench_synthesis_gpu 110 $TESTS -s benchmarks/bench_synthesis.py -k synthesis_on_a_gpu --benchmark-enable
grep '^{"case"' "$OUT/bench_synthesis_gpu.log" >"$OUT/synthesis_gpu.jsonl" 2>/dev/null
step tests 90 $TESTS -k "cuda or not cpu" python_tests/ops python_tests/models python_tests/test_fusion.py
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    step "$tool" 60 compute-sanitizer --tool "$tool" --error-exitcode 9 $TESTS python_tests/ops -k "cuda and odd"
  done
else
  echo "sanitizer: compute-sanitizer was not found" | tee -a "$OUT/summary.txt"
fi
step registers 20 sh -c 'cuobjdump --dump-resource-usage sage_fast/_ops_cuda*.so'
for bench in benchmarks/bench_*.py; do
  name=$(basename "$bench" .py)
  case $name in bench_dictionary | bench_synthesis | bench_training_step) continue ;; esac # on the CPU, and long
  step "$name" 45 $TESTS -s "$bench" --benchmark-enable --benchmark-json "$OUT/$name.json"
done
cat "$OUT/summary.txt"
