# `make demo` and `make test` need python3 (3.11 or newer), g++ and make; the rest they fetch into
# .venv. PYTHON=python3.12 chooses another interpreter.
PYTHON ?= python3

venv := .venv
bin := $(abspath $(venv)/bin)
python := $(bin)/python
sources := $(shell find csrc -type f) CMakeLists.txt pyproject.toml
torch := $(shell sed -n 's/^torch==/&/p' constraints.txt)
# CUDA kernels where a GPU could run them; elsewhere the tests compile them on their own.
cuda := $(if $(wildcard /dev/nvidiactl),ON,OFF)
cpp := $(shell find csrc tests/native -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
test_parts := lint types native gpu-rehearsal pytest

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help build demo test $(test_parts) bench gpu-check format clean

help: ## what there is
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 16

build: $(venv)/.native ## the environment and the compiled module

$(venv)/.dependencies: constraints.txt
	@sh .ci/prerequisites $(PYTHON)
	$(PYTHON) -m venv $(venv)
	@# The build of torch without CUDA where pip is set up to find it; else the one it finds.
	$(python) -m pip install -qq $(torch)+cpu 2>/dev/null || $(python) -m pip install -qq $(torch)
	$(python) -m pip install -qq -r constraints.txt
	@touch $@

$(venv)/.native: $(venv)/.dependencies $(sources)
	$(python) -m pip install -qq --no-build-isolation --no-deps \
	    --config-settings=cmake.define.FASTGEN_CUDA=$(cuda) --editable .
	@touch $@

demo: build ## samples from the small trained models
	$(python) -m fastgen demo

test: build ## everything that a machine without a GPU can check
	@failed=; report=; \
	for part in $(test_parts); do \
	    printf '\n== %s\n' $$part; start=$$(date +%s); \
	    $(MAKE) --no-print-directory $$part && verdict=passed || { verdict=FAILED; failed=1; }; \
	    report="$$report$$(printf '%-14s %-7s %4d s' $$part $$verdict $$(($$(date +%s) - start)))\n"; \
	done; \
	printf "\n$$report"; test -z "$$failed"

lint: build ## ruff and clang-format
	$(bin)/ruff check
	$(bin)/ruff format --check
	$(bin)/clang-format --dry-run --Werror $(cpp)

types: build ## mypy
	$(bin)/mypy

pytest: build ## tests/, the wheel and the sdist among them; static-checks stands for one test
	$(python) -m pytest --deselect tests/test_static_checks.py::test_every_kernel_keeps_the_limits

native: build ## the kernels under the address and undefined-behaviour sanitizers
	$(bin)/cmake -S . -B build/native -G Ninja -DCMAKE_MAKE_PROGRAM=$(bin)/ninja \
	    -DSKBUILD_PROJECT_VERSION=0 -DFASTGEN_NATIVE_TESTS=ON -DFASTGEN_SANITIZE=ON
	$(bin)/cmake --build build/native
	build/native/native_tests

static-checks: build ## registers, spills and instructions of the compiled GPU kernels
	$(python) -m fastgen.bench.static_checks

bench: build ## times of every op
	$(python) -m fastgen bench --save bench/results/cpu.json --draw bench/results \
	    > bench/results/cpu.txt; status=$$?; cat bench/results/cpu.txt; exit $$status

gpu-check: ## all that only a GPU can show, by the python that has torch; DRY=1 rehearses it
	$(if $(DRY),$(MAKE) --no-print-directory gpu-rehearsal,$(PYTHON) bench/gpu_check.py)

gpu-rehearsal: build ## gpu-check as far as it goes without a GPU, static-checks included
	$(python) bench/gpu_check.py --dry

format: build ## ruff and clang-format, in place
	$(bin)/ruff check --fix
	$(bin)/ruff format
	$(bin)/clang-format -i $(cpp)

clean: ## removes what was built, except the environment
	rm -rf build dist $(venv)/.native .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -not -path './$(venv)/*' -prune -exec rm -rf {} +
