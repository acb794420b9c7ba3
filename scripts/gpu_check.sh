#!/usr/bin/env bash
# What a machine with an NVIDIA GPU is for, one verb at a time; each ends by itself within eight minutes on 16 cores, `first` within nine.
#
#   scripts/gpu_check.sh first       for a GPU that is lent once: rates, smoke, ours beside eager and other packages with the time of
#                                    each kernel, small operators with the host's cost, CUDA's tests, memcheck and racecheck;
#                                    takes prebuilt libraries alone. Names of operators behind it: what the sanitizer watches
#   scripts/gpu_check.sh build       compiles for this GPU; prebuilt libraries of the same sources are accepted as they are
#   scripts/gpu_check.sh smoke       every operator, dtype and GPU backend against float64, at most 40 s
#   scripts/gpu_check.sh bench       times and shares of the GPU's rates: ours, then eager, then torch.compile
#   scripts/gpu_check.sh test        the device tests, CUDA's first, then Triton's
#   scripts/gpu_check.sh sanitize    compute-sanitizer's four tools on our kernels, or on those of the operators named behind it
#   scripts/gpu_check.sh all         all of them, shorter, in eight minutes
#
# Rows are written as they come to ${RESULTS:-benchmarks/results/<device>}: a killed command loses nothing, and
# `python3 -m benchmarks.show FILES` (or `ovseg bench show FILES`) reads what is there. Started again on these files and the same day
# with the same RUN=NAME, it goes on behind what is there. Downloads nothing; the project need not be installed. PYTHON chooses the
# interpreter. Exit status 0: all of it passed. What each verb needs: docs/testing.md.
set -uo pipefail
cd "$(dirname "$0")/.."
python=$(command -v "${PYTHON:-python3}") || { echo "gpu_check.sh: ${PYTHON:-python3} is not there; PYTHON chooses the interpreter" >&2; exit 2; }
export PATH="$(dirname "$python"):$PATH"  # cmake and ninja may lie beside it, in a virtual environment
command -v nvcc >/dev/null || export PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin"
# build/packages: what `pip install --no-deps --target build/packages` put there on a machine with a network.
export PYTHONPATH="$PWD:$PWD/scripts:$PWD/build/packages${PYTHONPATH:+:$PYTHONPATH}" PYTHONDONTWRITEBYTECODE=1
unset TRITON_INTERPRET OVSEG_BACKEND
exec "$python" scripts/gpu_check.py "$@"
