# make demo      install, build, train AFA on the embedded data set, write runs/demo/report.html
# make test      install and build if needed, run every test
# make lint      ruff, mypy, clang-format
# make smoke     the demo in about a minute, to see that every part runs (its figures mean nothing)
# make sanitize  the operators' tests on CPU kernels built for AddressSanitizer and UndefinedBehaviorSanitizer
# make stand-in  the tests that need a GPU on a stand-in for one: each memory access checked, then sanitized
# make abi-check show that the built library loads and computes under an older torch (OLD_TORCH=2.13.0)
# make pretrain  train the small backbone that ships in the package anew (about an hour on 2 cores)
# make bench     time the operators and a whole training step against PyTorch on this machine
# make kernels   compile the CUDA kernels and write docs/kernels.md's tables: registers, occupancy, limits
# make gpu-check on a machine with a GPU: build, test, sanitize and time the CUDA kernels, within eight minutes
# make clean     remove what the build and the runs wrote, but not the virtual environment

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

.PHONY: help demo test lint smoke sanitize stand-in abi-check pretrain bench kernels gpu-check clean install

help:
	@sed -n 's/^# //p' Makefile | head -12

demo: install
	$(BIN)/afa train demo

test: install
	$(BIN)/python -m pytest

smoke: install
	rm -rf runs/smoke
	$(BIN)/afa train demo --run runs/smoke train.iterations=30 train.classify_until=10 train.par_until=20 train.warmup=5

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

sanitize: install
	$(BIN)/python tools/sanitize.py

stand-in: install
	$(BIN)/python -m tests.cuda.run
	$(BIN)/python -m tests.cuda.run --sanitize

abi-check: install
	$(BIN)/python tools/abi_check.py --torch $(OLD_TORCH)

pretrain: install
	$(BIN)/python -m afa.commands.pretrain --out python/afa/weights/pvt_v2_mini.safetensors

bench: install
	for name in par_kernel random_walk affinity pseudo_labels train_step; do $(BIN)/python benchmarks/$$name.py || exit 1; done
	$(BIN)/python tools/update_readme.py

kernels: install
	$(BIN)/python tools/kernel_report.py
	$(BIN)/python tools/launch_counts.py

# Whatever Python has torch: the virtual environment's where there is one. Nothing is installed or fetched.
gpu-check:
	$(firstword $(wildcard $(BIN)/python) $(PYTHON)) tools/gpu_check.py

clean:
	rm -rf build dist *.egg-info runs data/demo
	find afa_ext -name '*.so' -delete

install: $(VENV)/.installed

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
