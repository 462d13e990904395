#!/usr/bin/env bash
# Every fuzz target for SECONDS each, with what was found and run in the last lines of its log.
#   tests/fuzz/run.sh PYTHON SECONDS [TARGET...]
# Needs clang (for those in C++, under AddressSanitizer and UndefinedBehaviorSanitizer: `operators`, every one of them;
# `program`, program.bin read and run; `saved`, manifests and states as the C interface reads them) and the package
# atheris (for the readers of files in Python); a target whose tool is missing is skipped, and said to be.
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

native="operators program saved"

build_native() {
  local compiler
  compiler=$(command -v clang++ || compgen -c clang++- | sort -V | tail -1)
  [ -n "$compiler" ] || { echo "$1: skipped, there is no clang++"; return 1; }
  cmake -S tests/fuzz -B "$work" -G Ninja -DCMAKE_CXX_COMPILER="$compiler" >/dev/null &&
    cmake --build "$work" --target "$1" >"$work/logs/build" 2>&1 || { tail "$work/logs/build"; failed=1; return 1; }
}

record() {
  if [ "$1" = operators ]; then
    EDGE_BCS_FUZZ_CORPUS=$work/corpus/operators PYTHONPATH=$PYTHONPATH:tests:tests/fuzz \
      "$python" -m pytest -q -p record_operators tests/native
  else
    PYTHONPATH=$PYTHONPATH:tests "$python" tests/fuzz/record_files.py "$work/corpus"
  fi
}

fuzz_native() {
  build_native "$1" || return
  [ -d "$work/corpus/$1" ] || record "$1" >"$work/logs/record" 2>&1 || { tail -3 "$work/logs/record"; failed=1; }
  mkdir -p "$work/found/$1"
  run "$1" "$work/$1" "$work/found/$1" "$work/corpus/$1" -max_len=65536
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

for target in ${*:-$native $readers}; do
  if [[ " $native " = *" $target "* ]]; then
    fuzz_native "$target"
  elif "$python" -c 'import atheris' 2>/dev/null; then
    mkdir -p "$work/found/$target"
    run "$target" "$python" tests/fuzz/readers.py "$target" "$work/found/$target" -max_len=65536
  else
    echo "$target: skipped, the package atheris is missing"
  fi
done
exit $failed
