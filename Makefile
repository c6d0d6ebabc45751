PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OLD_TORCH ?= 2.13.0
# Without a GPU nothing here runs the CUDA kernels, so one architecture is compiled: a quarter of the time of all that
# `pip install .` compiles. Its PTX still runs on later GPUs. TORCH_CUDA_ARCH_LIST overrides this.
ifeq ($(shell nvidia-smi -L 2>/dev/null),)
export TORCH_CUDA_ARCH_LIST ?= 8.0+PTX
endif
NATIVE := CMakeLists.txt setup.py pyproject.toml $(shell find csrc -type f)

.PHONY: help demo test test-fast lint smoke sanitize stand-in abi-check pretrain bench kernels gpu-check clean install

help: ## list these targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/make \1|\2/p' Makefile | awk -F'|' '{ printf "%-16s %s\n", $$1, $$2 }'

demo: install ## install, build, train AFA on the embedded data set, write runs/demo/report.html
	$(BIN)/afa train demo

# One thread per process: two processes that each start a thread per core only wait for each other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadgroup

test: install ## install and build if needed, run every test on all cores
	$(PYTEST)

test-fast: install ## the tests that are not marked slow, without the GPU stand-in, on all cores
	$(PYTEST) -m "not slow" --ignore tests/cuda

smoke: install ## the demo in about a minute, to see that every part runs (its figures mean nothing)
	rm -rf runs/smoke
	$(BIN)/afa train demo --run runs/smoke train.iterations=30 train.classify_until=10 train.par_until=20 train.warmup=5

lint: $(VENV)/.lint ## ruff, mypy, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

sanitize: install ## the operators' tests on CPU kernels built for AddressSanitizer and UndefinedBehaviorSanitizer
	$(BIN)/python tools/sanitize.py

stand-in: install ## the tests that need a GPU on a stand-in for one: each memory access checked, then sanitized
	$(BIN)/python -m tests.cuda.run
	$(BIN)/python -m tests.cuda.run --sanitize

abi-check: install ## show that the built library loads and computes under an older torch (OLD_TORCH=2.13.0)
	$(BIN)/python tools/abi_check.py --torch $(OLD_TORCH)

pretrain: install ## train the small backbone that ships in the package anew (about an hour on 2 cores)
	$(BIN)/python -m afa.commands.pretrain --out python/afa/weights/pvt_v2_mini.safetensors

bench: install ## time the operators and a whole training step against PyTorch on this machine
	for name in par_kernel random_walk affinity pseudo_labels train_step; do $(BIN)/python benchmarks/$$name.py || exit 1; done
	$(BIN)/python -m tools.update_readme

kernels: install ## compile the CUDA kernels and write docs/kernels.md's tables: registers, occupancy, limits
	$(BIN)/python -m tools.kernel_report
	$(BIN)/python -m tools.launch_counts

# Whatever Python has torch: the virtual environment's where there is one. Nothing is installed or fetched.
gpu-check: ## on a machine with a GPU: build, test, sanitize and time the CUDA kernels, within eight minutes
	$(firstword $(wildcard $(BIN)/python) $(PYTHON)) -m tools.gpu_check

clean: ## remove what the build and the runs wrote, but not the virtual environment
	rm -rf build dist *.egg-info runs data/demo
	find afa_ext -name '*.so' -delete

install: $(VENV)/.installed ## make the virtual environment and build the package into it
# torch and the build's tools first, so that the package itself is built against the torch it will run with, without
# the second copy of torch that an isolated build would fetch.
$(VENV)/.tools: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python tools/build_requirements.py > $(VENV)/build-requirements.txt
	$(BIN)/pip install --disable-pip-version-check -q --progress-bar on -r $(VENV)/build-requirements.txt
	touch $@

$(VENV)/.installed: $(VENV)/.tools $(NATIVE)
	$(BIN)/pip install --disable-pip-version-check -q --progress-bar on --no-build-isolation -e ".[test]"
	touch $@

$(VENV)/.lint: $(VENV)/.installed
	$(BIN)/pip install --disable-pip-version-check -q --no-build-isolation -e ".[dev]"
	touch $@
