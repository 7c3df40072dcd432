# One command per activity; `make help` lists them. A target that needs the virtual environment or
# the C core makes them first. ARGS='...' goes to the program that the target runs.

VENV := .venv
BIN := $(VENV)/bin
CORE := native/_core.abi3.so
C_FILES := $(wildcard native/*.[ch] native/cdef/*.h)
# Tests wait more than they compute; ARGS=-n0 runs them one after the other.
WORKERS := 4
WARNINGS := -std=gnu11 -D_GNU_SOURCE= -O2 -Wall -Wextra -Werror

.PHONY: help build demo test check debug fuzz vm bench clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 8

build: $(CORE)  ## make .venv and the C core, as far as something changed

demo: build  ## show it at work: real data paged in and out, and checked
	$(BIN)/userswap demo $(ARGS)

test: build  ## run the tests; as an ordinary user the privileged ones are skipped
	$(BIN)/pytest -n $(WORKERS) --dist worksteal $(ARGS)

check: build  ## lint, format, types, floors and the C compiler's warnings
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy -p userswap
	$(BIN)/mypy tests
	$(BIN)/pytest -q tests/test_floors.py
	@for file in $(wildcard native/*.c bench/*.c); do for checks in U D; do \
	    command="$(CC) $(WARNINGS) -$${checks}US_DEBUG -Inative -c $$file -o /dev/null"; \
	    echo "$$command"; $$command || exit 1; done; done

debug:  ## run the tests with state checks, AddressSanitizer and UndefinedBehaviorSanitizer
	.ci/debug $(ARGS)

vm: build  ## run what needs virtual machines and is long (as root); ARGS=tests/test_nvmet.py: minutes
	$(BIN)/pytest -m vm -s $(ARGS)

fuzz: build  ## feed both ends of NVMe over TCP a million mutated streams; ARGS='--inputs N --seed N'
	$(BIN)/python tests/nvme_fuzz.py $(ARGS)

bench: build  ## compare with kernel swap (as root)
	$(BIN)/userswap bench kernel $(ARGS)

clean:  ## remove everything that was built, the virtual environments too
	rm -rf build dist .venv .venv-debug *.egg-info engine/*.egg-info native/*.so
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find engine backends native bench tests -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/.ready: pyproject.toml native/_build.py .ci/setup
	.ci/setup $(VENV)

# A virtual environment that was just made has just built the core.
$(CORE): $(C_FILES) | $(VENV)/.ready
	@if [ ! -e $@ ] || [ -n "$$(find $(C_FILES) -newer $@)" ]; then \
	    echo "building $@"; flock build/setup.lock $(BIN)/python -W ignore native/_build.py; fi
