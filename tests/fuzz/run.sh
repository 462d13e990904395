#!/usr/bin/env bash
# Every fuzz target for SECONDS each, with what was found and run in the last lines of its log.
#   tests/fuzz/run.sh PYTHON SECONDS [TARGET...]
# Needs clang (for `operators`: every operator, under AddressSanitizer and UndefinedBehaviorSanitizer) and the
# package atheris (for the readers of files); a target whose tool is missing is skipped, and said to be.
set -u
cd "$(dirname "$0")/../.."
python=$1 seconds=$2
shift 2
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
readers="manifest state checkpoint archive onnx onnx_network ort_checkpoint npz cifar tar compressed_tar image mat"
work=build/fuzz
mkdir -p "$work/findings" "$work/logs"
limits="-timeout=10 -rss_limit_mb=2048 -malloc_limit_mb=512 -max_total_time=$seconds -print_final_stats=1"
failed=0

operators() {
  local compiler
  compiler=$(command -v clang++ || compgen -c clang++- | sort -V | tail -1)
  [ -n "$compiler" ] || { echo "operators: skipped, there is no clang++"; return; }
  cmake -S tests/fuzz -B "$work" -G Ninja -DCMAKE_CXX_COMPILER="$compiler" >/dev/null &&
    cmake --build "$work" >"$work/logs/build" 2>&1 || { tail "$work/logs/build"; failed=1; return; }
  if [ ! -d "$work/corpus/operators" ]; then
    EDGE_BCS_FUZZ_CORPUS=$work/corpus/operators PYTHONPATH=$PYTHONPATH:tests:tests/fuzz \
      "$python" -m pytest -q -p record_operators tests/native >"$work/logs/record" 2>&1 ||
      { tail -3 "$work/logs/record"; failed=1; }
  fi
  mkdir -p "$work/found/operators"
  run operators "$work/operators" "$work/found/operators" "$work/corpus/operators" -max_len=32768
}

run() {
  local name=$1
  shift
  # shellcheck disable=SC2086
  "$@" $limits -artifact_prefix="$work/findings/$name-" >"$work/logs/$name" 2>&1
  local code=$?
  local runs covered
  runs=$(sed -n 's/^Done \([0-9]*\) runs.*/\1/p' "$work/logs/$name")
  covered=$(sed -n 's/^#.* cov: \([0-9]*\) .*corp: \([0-9]*\)\/.*/\1 edges, corpus of \2/p' "$work/logs/$name" | tail -1)
  if [ $code -eq 0 ]; then
    echo "$name: ${runs:-?} runs in $seconds s, $covered, nothing found"
  else
    echo "$name: a finding, see $work/logs/$name and $work/findings"
    failed=1
  fi
}

for target in ${*:-operators $readers}; do
  if [ "$target" = operators ]; then
    operators
  elif "$python" -c 'import atheris' 2>/dev/null; then
    mkdir -p "$work/found/$target"
    run "$target" "$python" tests/fuzz/readers.py "$target" "$work/found/$target" -max_len=65536
  else
    echo "$target: skipped, the package atheris is missing"
  fi
done
exit $failed
