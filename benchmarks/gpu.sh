#!/bin/sh
# On a machine with a CUDA GPU, nvcc and a CUDA build of torch: build, test, bench, sanitize; results under OUT (default gpu_out).
#
#   benchmarks/gpu.sh [--dry-run]        --dry-run: list the parts and their limits, do nothing
#   PEERS="/path/stylegan3 ..."          clones of other people's StyleGAN2, timed beside ours
#   ONLY="build bench_fusion"            these parts alone
#   BENCH="--bench-compile"              further options of the benchmarks, such as torch.compile of the best plain form
#
# Under nine minutes in all: what is only right or wrong first and all of it at once, then what is timed, one part after the other,
# those of most value first. A part gets its own limit or what is left, whichever is less, and is interrupted (not killed) at it,
# so that it still reports. When one fails the others go on. Nothing is downloaded. Every part writes OUT/<part>.log, benchmarks
# OUT/<part>.json, and OUT/summary.json says how each ended. Exit 1 if any part failed.
set -u
cd "$(dirname "$0")/.."
OUT=${OUT:-gpu_out}
PYTHON=$(command -v "${PYTHON:-python3}")
case $PYTHON in /*) ;; *) PYTHON=$PWD/$PYTHON ;; esac
SECONDS_IN_ALL=${SECONDS_IN_ALL:-520}
ONLY=${ONLY:-}
DRY=
[ "${1:-}" = --dry-run ] && DRY=1
if [ -z "${TORCH_CUDA_ARCH_LIST:-}" ]; then # for this card alone: half of nvcc's time
  TORCH_CUDA_ARCH_LIST=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1)
fi
export TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-8.0;9.0}" MAX_JOBS="${MAX_JOBS:-16}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 SAGE_FAST_BUILD=aot PYTHONUNBUFFERED=1
begin=$(date +%s)
part() { # name, seconds at most, command...
  name=$1 limit=$2
  shift 2
  case " $ONLY " in "  " | *" $name "*) ;; *) return ;; esac
  if [ -n "$DRY" ]; then
    echo "$name: at most $limit s: $*"
    return
  fi
  start=$(date +%s)
  left=$((SECONDS_IN_ALL - start + begin))
  [ "$left" -lt "$limit" ] && limit=$left
  if [ "$limit" -lt 10 ]; then
    ended "$name" '"not started, no time left"' 0
    return
  fi
  timeout -s INT -k 10 "$limit" "$@" >"$OUT/$name.log" 2>&1
  ended "$name" $? $(($(date +%s) - start))
}
ended() { # part, exit status or why not, seconds
  echo "$1: exit $2, $3 s"
  echo "\"$1\": {\"exit\": $2, \"seconds\": $3}" >"$OUT/ended/$1"
}
tests() { # name, seconds, words of pytest...
  name=$1 limit=$2
  shift 2
  part "$name" "$limit" "$PYTHON" -m pytest -q -p no:cacheprovider "$@"
}
bench() { # name, seconds, file, words of pytest...
  name=$1 limit=$2 file=$3
  shift 3
  # shellcheck disable=SC2086 # BENCH and peers are words
  tests "bench_$name" "$limit" "benchmarks/bench_$file.py" --benchmark-enable --bench-device cuda \
    --bench-json "$OUT/bench_$name.json" $peers ${BENCH:-} "$@"
}
peers=
for path in ${PEERS:-}; do peers="$peers --peer-path $path"; done
if [ -z "$DRY" ]; then
  rm -rf "$OUT/ended"
  mkdir -p "$OUT/ended"
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv >"$OUT/gpu.csv" 2>&1
fi

part build 180 "$PYTHON" setup.py build_ext --inplace
part info 30 sh -c '"$0" -c "import json; from sage_fast.info import build_report; print(json.dumps(build_report(), default=str))" >"$1" && cat "$1"' \
  "$PYTHON" "$OUT/info.json"
# memory by itself for every tensor, so that a step beyond one shows
watched() { # tool of compute-sanitizer, its words...
  tool=$1
  shift
  part "$tool" 110 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 9 --tool "$tool" "$@" \
    "$PYTHON" -m pytest -q -p no:cacheprovider python_tests/ops/test_every_kernel.py -k cuda
}
workers=
"$PYTHON" -c "import xdist" 2>/dev/null && workers="-n 8"
{
  watched memcheck --report-api-errors no &
  watched racecheck &
  watched synccheck &
  tests every_kernel 60 python_tests/ops/test_every_kernel.py -k cuda &
  # shellcheck disable=SC2086 # words
  tests tests 110 $workers -k "cuda or replayed or nvjpeg or timm or lightning" python_tests/ops python_tests/models \
    python_tests/training/test_augment.py python_tests/training/test_graphed.py python_tests/training/test_ranks.py \
    python_tests/training/test_batches.py python_tests/generation/test_nvjpeg.py python_tests/generation/test_precision.py \
    python_tests/test_mixing_stream.py python_tests/test_train_with_generated.py &
  part tests_large 60 env SAGE_FAST_LARGE_TESTS=1 "$PYTHON" -m pytest -q -p no:cacheprovider -k "31 and cuda" python_tests/ops/test_upfirdn2d.py &
  part demo 110 "$PYTHON" -m sage_fast.demo --out "$OUT/demo" &
  part train 110 sh -c 'set -e; cd "$1"; sage="$0 -m sage_fast.cli"
    $sage data flora --out seen --overwrite --n-per-category 10; $sage data flora --out unseen --overwrite --which unseen --n-per-category 1
    $sage train --data seen --out run --overwrite --resolution 32 --gan.total-kimg 1 --gan.augment.kind ada --encoder.total-steps 40 \
      --encoder.tune-generator --gan.precision bfloat16 --encoder.precision bfloat16 --dictionary.total-steps 40
    $sage generate --model run --shots unseen --out new --overwrite -n 8 --fusion both --image jpg
    $sage verify new; $sage profile --model run -n 16 --precision bfloat16' "$PYTHON" "$OUT" &
  if [ -n "$peers" ]; then # compiles theirs
    # shellcheck disable=SC2086
    tests peers 110 benchmarks/bench_training_step.py --bench-device cuda $peers -k "step and 32s and float32" &
  fi
  wait
}
if [ -e "$OUT/ended/peers" ] && ! grep -q '"exit": 0,' "$OUT/ended/peers"; then
  echo "the clones do not run here (peers.log): timed without them"
  peers=
fi
bench convolutions 30 synthesis -k convolutions
bench synthesis 100 synthesis -k "(gpu or memory) and not convolutions"
bench training_step 60 training_step
bench scaled_bias_act 20 scaled_bias_act
bench fusion 40 fusion
bench project_onto_basis 30 project_onto_basis
part generate 120 sh -c 'set -e
  for way in "auto bfloat16" "nvjpeg bfloat16" "auto float32" "auto tf32"; do
    encoder=${way% *} precision=${way#* }
    name=generate_${encoder}_$precision
    if [ $encoder = nvjpeg ] && ! "$0" -c "import torchvision"; then
      echo "no torchvision: nvjpeg is not timed"
      continue
    fi
    "$0" benchmarks/bench_generate.py --device cuda --sizes 64 256 --image jpg --encoder $encoder --precision $precision --rounds 3 \
      --scale "$1" >"$2/$name.txt"
    tail -n 1 "$2/$name.txt" | tee "$2/$name.json"
  done' "$PYTHON" "${SCALE:-8}" "$OUT"
bench gaussian_low_pass 25 gaussian_low_pass
bench modulated_conv2d 25 modulated_conv2d
bench edit_latents 20 edit_latents
bench least_squares_codes 20 least_squares_codes
bench upfirdn2d 30 upfirdn2d
bench bias_act 30 bias_act
part registers 20 sh -c 'cuobjdump --dump-resource-usage sage_fast/_ops_cuda*.so'
[ -n "$DRY" ] && exit 0
if [ -z "$(ls "$OUT/ended")" ]; then
  echo "no part is called '$ONLY'; --dry-run lists them" >&2
  exit 2
fi
echo "{$(cat "$OUT"/ended/* | paste -sd, -)}" | tee "$OUT/summary.json"
! grep -qv '"exit": 0,' "$OUT"/ended/*
