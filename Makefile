# `make demo` and `make test` do everything on a fresh machine: they create the virtual environment and install
# what is missing. Needs Python 3.11 or newer with venv.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
DEV    := $(VENV)/.installed-dev
ROOT   := $(if $(filter-out 0,$(shell id -u)),sudo)

.PHONY: setup dev browser demo test check lint type bench soak up
setup: $(STAMP)
dev: $(DEV)

# Bytecode is written for what is used, when it is used: to do so for all that is installed takes longest of all.
# So it must be written, or each of the many processes would compile anew what it imports.
export PYTHONDONTWRITEBYTECODE :=
PIP   := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
TORCH := $(shell grep -i '^torch==' constraints.txt)

define install
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) "$(TORCH)"
	$(PIP) -c constraints.txt -e ".[$(1)]"
	touch $(STAMP)
endef

# What it takes to use the project, and what it takes to change it. Processes of a first stack would all write the
# same bytecode at once, which takes them a minute more than it takes here.
$(STAMP): pyproject.toml constraints.txt
	$(call install,all)
	$(BIN)/python -m compileall -q -j 0 $(VENV)/lib >/dev/null || true

$(DEV): pyproject.toml constraints.txt
	$(call install,dev)
	touch $@

# The tests of the page drive the system's Chromium.
browser:
	command -v chromium >/dev/null || { $(ROOT) apt-get update -qq && \
	    $(ROOT) env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium; }

demo: setup
	$(BIN)/wa demo --out out

test: export CI := true
test: check browser
	$(BIN)/python .ci/group.py -n 2 -m "not stack and not chaos and not soak"
	$(BIN)/python .ci/group.py -n 2 -m "(stack or chaos) and not soak"

# The long versions of the fault tests: about an hour. More schedules: pytest tests/chaos/test_simulation.py --sim-seeds=N
soak: dev
	$(BIN)/python -m pytest -m soak

check: lint type

lint: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

type: dev
	$(BIN)/mypy

bench: dev
	$(BIN)/python -m benchmarks

up: setup
	$(BIN)/wa up
