# One command per activity; `make help` lists them. Every target makes .venv when it is missing.

VENV := .venv
BIN := $(VENV)/bin
C_FILES := $(wildcard native/*.[ch] native/cdef/*.h)
CORE := native/_core.abi3.so

.PHONY: build clean help
.DEFAULT_GOAL := help

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

build: $(CORE)  ## make .venv, build the C core (only what changed)

$(VENV)/.ready: pyproject.toml native/_build.py .ci/setup
	.ci/setup $(VENV)

# A virtual environment that was just made has just built the core.
$(CORE): $(C_FILES) | $(VENV)/.ready
	@if [ ! -e $@ ] || [ -n "$$(find $(C_FILES) -newer $@)" ]; then \
	    echo "building $@"; $(BIN)/python -W ignore native/_build.py; fi

clean:  ## remove what was built, the virtual environments too
	rm -rf build dist .venv .venv-debug *.egg-info engine/*.egg-info native/*.so
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find engine backends native bench tests -name __pycache__ -prune -exec rm -rf {} +
