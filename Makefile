# `make help` lists the targets. Set-up (system packages, Vulkan's parts, driver, .venv) is tools/setup.sh; the build is CMakeLists.txt.
PYTHON := .venv/bin/python
JOBS   ?= $(shell nproc)
CMAKE_FLAGS ?=
ENGINE := python/vksteer/_engine.abi3.so

.PHONY: build
build:
	@.venv/bin/cmake -S . -B build -G Ninja --log-level=WARNING -DCMAKE_MAKE_PROGRAM=$(CURDIR)/.venv/bin/ninja \
	    -DPython_EXECUTABLE=$(CURDIR)/$(PYTHON) -DVKSTEER_WERROR=ON -DVKSTEER_IN_PLACE=ON $(CMAKE_FLAGS)
	@.venv/bin/cmake --build build -j $(JOBS)
