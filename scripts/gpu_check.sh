#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one run of under nine minutes: builds for this GPU, runs the device tests,
# compute-sanitizer and the benchmark, and writes benchmarks/results/<device>/.
#
# Needs what such machines have, and downloads nothing: torch >= 2.10 with CUDA, triton, numpy, pytest, cmake, ninja, nvcc.
# The project need not be installed. PYTHON chooses the interpreter, RESULTS the folder; exit status 0: all of it passed.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONDONTWRITEBYTECODE=1
unset TRITON_INTERPRET OVSEG_BACKEND
status=0
began=$SECONDS

facts=$("$python" - <<'PY'
import re, sys
import torch
if not torch.cuda.is_available():
    sys.exit("gpu_check.sh needs an NVIDIA GPU, and torch sees none")
major, minor = torch.cuda.get_device_capability()
name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
print(name, f"{major}.{minor}" + ("a" if major == 9 else ""), torch.__path__[0])
PY
) || exit 1
read -r device arch torch_root <<<"$facts"
results=${RESULTS:-benchmarks/results/$device}
date=$(date +%Y-%m-%d)
mkdir -p "$results"
log="$results/$date.log"
echo "gpu_check on $device, sm_${arch/./}: $(git rev-parse --short HEAD 2>/dev/null || echo 'no git')" | tee "$log"

# step NAME SECONDS COMMAND...: runs it with a time limit, keeps its output, notes how it ended.
step() {
  local name=$1 limit=$2 start=$SECONDS code
  shift 2
  echo "== $name: $*" >>"$log"
  timeout "$limit" "$@" >>"$log" 2>&1
  code=$?
  [ $code -eq 0 ] || status=1
  echo "$name: $([ $code -eq 0 ] && echo passed || echo "FAILED, exit status $code"), $((SECONDS - start)) s" | tee -a "$log"
  return $code
}

build() {
  cmake -S . -B build/gpu $(command -v ninja >/dev/null && echo -G Ninja) -DOVSEG_CUDA=ON -DOVSEG_CUDA_ARCHS="$arch" \
    -DOVSEG_TORCH_INCLUDE="$torch_root/include" -DOVSEG_TORCH_LIB="$torch_root/lib" -DOVSEG_OUTPUT="$PWD/ovseg_kernels" &&
    cmake --build build/gpu --parallel
}
step "build" 200 bash -c "$(declare -f build); arch='$arch' torch_root='$torch_root' build" || exit 1
step "info" 60 "$python" -m ovseg_kernels.info
step "device tests" 200 "$python" -m pytest tests/ops -m gpu -q -p no:cacheprovider --junitxml="$results/$date-tests.xml"

sanitizer=$(command -v compute-sanitizer || ls "$(dirname "$(readlink -f "$(command -v nvcc)")")/compute-sanitizer" 2>/dev/null)
if [ -n "$sanitizer" ]; then
  for tool in memcheck initcheck synccheck racecheck; do
    step "compute-sanitizer $tool" 45 env OVSEG_BACKEND=cuda "$sanitizer" --tool "$tool" --error-exitcode 9 "$python" scripts/gpu_small.py
  done
else
  echo "compute-sanitizer: not on this machine, not run" | tee -a "$log"
fi

left=$((510 - (SECONDS - began)))
step "benchmark" "$left" "$python" -m benchmarks.gpu --out "$results/$date.jsonl" --budget $((left > 60 ? left - 45 : 15))
echo "$([ $status -eq 0 ] && echo 'all passed' || echo 'NOT all passed'), $((SECONDS - began)) s; see $log" | tee -a "$log"
exit $status
