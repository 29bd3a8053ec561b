# make demo, make test: everything from an empty clone to a result. `make help` lists the rest.
#
# PYTHON=python3.12   interpreter for a new .venv       JOBS=4           parallel compiler runs
# TORCH=...           what pip installs as torch        PYTEST_ARGS=...  passed on to pytest
# WERROR=ON           compiler warnings are errors (CI does this)

SHELL := /bin/bash
VENV ?= .venv
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
WERROR ?= OFF
PYTEST_ARGS ?=
export VENV JOBS WERROR PYTHON TORCH
export MAX_JOBS := $(JOBS)
export PATH := $(abspath $(VENV))/bin:$(PATH)

CPP_SOURCES = $(shell find csrc tests/cpp tests/emulation -type f \( -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' \) 2>/dev/null)
PYTHON_SOURCES = python bench tests scripts examples setup.py
CTEST = ctest --output-on-failure --no-tests=error --parallel $(JOBS)

.DEFAULT_GOAL := help
.PHONY: help demo test test-cpp test-sanitize test-tsan test-python lint check-format check-lint check-types \
	check-layers format docs bench-smoke cuda-check emulation gpu-check check-cli check-installs wheel env env-demo \
	clean distclean

help: ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 22

demo: env-demo ## environment, build, weights, then the demo; writes demo-report/
	stateful-kv demo

test: test-cpp test-sanitize test-python ## environment, build and every test

test-cpp: env ## C++ unit tests
	scripts/ensure_gtest.sh
	cmake -S . -B build/cpp -G Ninja -DSTATEFUL_KV_TORCH=OFF -DSTATEFUL_KV_TESTS=ON \
		-DSTATEFUL_KV_CUDA=OFF -DSTATEFUL_KV_WERROR=$(WERROR)
	cmake --build build/cpp --parallel $(JOBS)
	$(CTEST) --test-dir build/cpp

test-sanitize: env ## C++ unit tests with AddressSanitizer and UndefinedBehaviorSanitizer
	scripts/ensure_gtest.sh
	cmake -S . -B build/cpp-sanitize -G Ninja -DSTATEFUL_KV_TORCH=OFF -DSTATEFUL_KV_TESTS=ON \
		-DSTATEFUL_KV_CUDA=OFF -DSTATEFUL_KV_SANITIZE=address -DSTATEFUL_KV_WERROR=$(WERROR)
	cmake --build build/cpp-sanitize --parallel $(JOBS)
	$(CTEST) --test-dir build/cpp-sanitize

test-tsan: env ## the thread pool and the kernels on it with ThreadSanitizer
	scripts/ensure_gtest.sh
	cmake -S . -B build/cpp-tsan -G Ninja -DSTATEFUL_KV_TORCH=OFF -DSTATEFUL_KV_TESTS=ON \
		-DSTATEFUL_KV_CUDA=OFF -DSTATEFUL_KV_SANITIZE=thread -DSTATEFUL_KV_WERROR=$(WERROR)
	cmake --build build/cpp-tsan --parallel $(JOBS)
	$(CTEST) --test-dir build/cpp-tsan

emulation: env ## the CUDA kernels as C++, which the op tests run without a GPU
	PYTHON=python scripts/build_emulation.sh

test-python: emulation ## op, binding, property and end-to-end tests
	python -m pytest $(PYTEST_ARGS)

lint: check-format check-lint check-types check-layers ## all checks that run no test

check-format: env
	ruff format --check $(wildcard $(PYTHON_SOURCES))
	clang-format --dry-run -Werror $(CPP_SOURCES)

check-lint: env
	ruff check $(wildcard $(PYTHON_SOURCES))
	python scripts/checks/check_banned.py

check-types: env
	mypy

check-layers: env
	python scripts/checks/check_layers.py
	lint-imports

format: env ## rewrite the sources in the project's style
	ruff check --fix-only --select I $(wildcard $(PYTHON_SOURCES))
	ruff format $(wildcard $(PYTHON_SOURCES))
	clang-format -i $(CPP_SOURCES)

bench-smoke: env ## every bench suite on its smallest case
	python -m bench run ops state cpu_linear cpu_attention cpu_model workflow hf_adapter quality \
		gpu_attention gpu_model gpu_workflow --smoke --device cpu

cuda-check: env ## compile the CUDA sources, if nvcc is there (no GPU needed)
	scripts/checks/check_cuda.sh

gpu-check: ## on a GPU machine: build, test and measure the CUDA backend; OUT=folder
	@test -n "$(OUT)" || { echo "usage: make gpu-check OUT=folder" >&2; exit 2; }
	scripts/gpu_check.sh "$(OUT)"

check-cli: env ## the installed command line on the default model, with state and without
	scripts/checks/check_cli.sh

check-installs: env ## install as users do, each time into an empty environment; PARTS=... for some
	scripts/checks/check_installs.sh $(PARTS)

wheel: env ## build a wheel against the torch of .venv into dist/
	python -m build --no-isolation --wheel --outdir dist .

docs: env ## the documentation as a site, in build/site; a warning is an error
	python -m mkdocs build --strict

env: ## .venv with the package, the weights and all tools
	@scripts/setup_env.sh dev

env-demo:
	@scripts/setup_env.sh demo

clean: ## remove what builds and tests made; keeps .venv
	rm -rf build dist demo-report python/*.egg-info python/stateful_kv/*.so
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find python bench tests scripts -type d -name __pycache__ -prune -exec rm -rf {} +

distclean: clean ## clean, and remove .venv too
	rm -rf $(VENV)
