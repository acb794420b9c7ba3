# Two commands for a fresh machine: `make demo` and `make test`. Both make .venv on first use.
PYTHON ?= python3
VENV ?= .venv
DATA ?= digits
SEED ?= 0
BIN := $(VENV)/bin
# The CUDA library takes minutes to compile; the tests build it themselves, for the architectures they look at.
export FORCE_CUDA ?= 0
STAMP := $(VENV)/.installed

.PHONY: demo test lint bench gpu gpu-build faults clean

$(STAMP): pyproject.toml setup.py constraints.txt CMakeLists.txt $(shell find csrc -type f 2>/dev/null)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch torchvision setuptools wheel numpy cmake ninja
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/pip install -q -c constraints.txt --no-build-isolation -e '.[dev]'
	$(BIN)/python -m ovseg_kernels.info
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/ovseg demo --data $(DATA) --seed $(SEED) --out runs/demo_$(DATA)_$(SEED) 2>&1

test: $(STAMP)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 40

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run --Werror $$(find csrc tests/cuda_emulation -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

bench: $(STAMP)
	$(BIN)/ovseg bench

gpu:
	scripts/gpu_check.sh all

# For a GPU elsewhere: both libraries in place, for every architecture or those of TORCH_CUDA_ARCH_LIST. They run on any x86-64
# with torch >= 2.10, and gpu_check.sh there accepts them as long as csrc/ is the same.
gpu-build: export FORCE_CUDA = 1
gpu-build: export OVSEG_BUILD_NATIVE = 1
gpu-build: $(STAMP)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python setup.py build_ext --inplace
	$(BIN)/python -m ovseg_kernels.info

faults: $(STAMP)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python scripts/plant_faults.py

clean:
	rm -rf build dist *.egg-info ovseg_kernels/_C_*.so ovseg_kernels/build_info.json
