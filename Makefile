# Thin wrappers: every target is one command in the environment that the first line of a target sets up.
#   make train ARGS="training.steps=200"

PYTHON ?= python3
BIN := .venv/bin
ARGS ?=
# Python compiles what is imported when it is imported, which of all that is installed is a small part.
INSTALL := install --quiet --no-compile

.PHONY: train test test-all test-titan03 lint kernels self-test facts clean

train: kernels
	$(BIN)/flashmoe train quickstart $(ARGS)

# Where there are a GPU and nvcc, csrc/hopper is tested on it.
SELF_TEST := $(if $(wildcard /dev/nvidia0),$(if $(or $(CUDACXX),$(shell command -v nvcc)),self-test))

# Two files at a time: tests compute little and wait much, for processes that start and for compilers. In their order,
# where files of a few long tests do not come last.
JOBS := --numprocesses 2 --dist loadfile --no-loadscope-reorder

test: kernels $(SELF_TEST)
	$(BIN)/pytest $(JOBS) -m "not slow" $(ARGS)

test-all: kernels $(SELF_TEST) test-titan03
	$(BIN)/pytest $(JOBS) $(ARGS)

# TorchTitan 0.3 and the torch it needs, in an environment of their own. The sources are used as they stand, with the
# CUDA library if it is there.
TITAN03 := .venv-titan03
test-titan03: $(TITAN03)/installed
	$(TITAN03)/bin/python -m pytest $(JOBS) tests/integrations/torchtitan $(ARGS)

$(TITAN03)/installed: requirements-titan03.txt
	$(PYTHON) -m venv $(TITAN03)
	$(TITAN03)/bin/pip $(INSTALL) --requirement requirements-titan03.txt
	@touch $@

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The package is built with the torch of its own environment: an isolated build would unpack gigabytes of another one.
.venv/installed: pyproject.toml constraints.txt csrc/CMakeLists.txt
	@$(PYTHON) -c 'import sys; sys.exit(f"Python 3.11 or later is needed, found {sys.version.split()[0]}; set PYTHON=" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/pip $(INSTALL) --constraint constraints.txt cmake ninja scikit-build-core torch
	$(BIN)/pip $(INSTALL) --constraint constraints.txt --no-build-isolation --check-build-dependencies \
		--editable '.[torchtitan,megatron,dev]'
	@touch $@

# The installation has built the kernels, if there is nvcc; later changes are compiled here, in seconds.
LIBRARY := flashmoe_train/libflashmoe_cuda.so
kernels: .venv/installed
	@if [ -e $(LIBRARY) ] && [ -z "$$(find csrc -newer $(LIBRARY))" ]; then :; \
	elif [ -n "$${CUDACXX:-$$(command -v nvcc)}" ]; then \
		$(BIN)/cmake -S csrc -B build -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python && $(BIN)/cmake --build build --parallel && \
		touch $(LIBRARY); \
	elif [ -e $(LIBRARY) ]; then \
		echo "csrc is newer than $(LIBRARY), and there is no nvcc to compile it: set CUDACXX, or delete the library"; exit 1; \
	fi

self-test: kernels
	$(BIN)/cmake -S csrc -B build -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python
	$(BIN)/cmake --build build --parallel --target flashmoe_hopper_test

# What flashmoe_train.bench.hopper measures with.
facts: kernels
	$(BIN)/cmake -S csrc -B build -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python
	$(BIN)/cmake --build build --parallel --target flashmoe_hopper_throughput flashmoe_hopper_races

clean:
	rm -rf .venv $(TITAN03) build dist outputs $(LIBRARY)
