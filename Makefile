# Each target does all of its own set-up: a machine with Python 3.11 and pip is enough.
#   make demo        train, check and show the embedded default
#   make demo-later  go on from there: conversations about two pictures, drawing, speaking
#   make test        the whole test suite
#   make check       format, lint, strict types, import rules
#   make setup       .venv with everything for development; `make clean` removes it

PYTHON  ?= $(shell command -v python3.11 || command -v python3 || command -v python)
TORCH   ?= torch==2.13.0
WORKERS ?= 2
VENV    := .venv
BIN     := $(VENV)/bin
PACKAGE := qwen3_vlm
LINTED  := $(PACKAGE) tests benchmarks scripts

# Without cached bytecode each new process would compile torch's sources again, which takes ten seconds.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo demo-later test check format clean

help:
	@sed -n 's/^#   //p' $(firstword $(MAKEFILE_LIST))

setup: $(VENV)/.installed-dev

demo: $(VENV)/.installed-demo
	@$(BIN)/qwen3-vlm demo

demo-later: $(VENV)/.installed-later
	@$(BIN)/qwen3-vlm demo --later

# One thread per worker: two workers with two threads each would only wait for each other.
test: $(VENV)/.installed-dev
	@HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal $(TESTS)

check: $(VENV)/.installed-dev
	@$(BIN)/ruff format --check $(LINTED)
	@$(BIN)/ruff check $(LINTED)
	@$(BIN)/mypy --strict $(PACKAGE)
	@$(BIN)/python -m pytest -q tests/test_import_rules.py

format: $(VENV)/.installed-dev
	@$(BIN)/ruff format $(LINTED)
	@$(BIN)/ruff check --fix $(LINTED)

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache *.egg-info

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "No Python was found. Install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else "$(PYTHON) is Python %d.%d; qwen3-vlm needs 3.11 or newer. Name another one: make PYTHON=/path/to/python3.11" % v[:2])'
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "$(PYTHON) could not make a virtual environment; on Debian and Ubuntu, install python3-venv first."; exit 1; }

# lmms-eval asks for some fifty packages, most of them for its tasks; our model class meets its interface alone.
LMMS_EVAL := lmms-eval evaluate loguru pytz
define install_alone
	@$(BIN)/python -m pip install --disable-pip-version-check --no-input --no-compile --no-deps -c constraints.txt $(1) \
	    >> $(VENV)/install.log 2>&1 || { cat $(VENV)/install.log; echo "The installation failed; its log is above."; exit 1; }
endef

# pip's own log is shown only when it fails. torch is named first and exactly, so that pip takes that build.
define install
	@echo "Installing $(1) into $(VENV) (pinned in constraints.txt; a minute or two) ..."
	@$(BIN)/python -m pip install --disable-pip-version-check --no-input --no-compile -c constraints.txt $(TORCH) -e "$(2)" \
	    > $(VENV)/install.log 2>&1 || { cat $(VENV)/install.log; echo "The installation failed; its log is above."; exit 1; }
	@touch $@
endef

$(VENV)/.installed-demo: pyproject.toml constraints.txt | $(BIN)/python
	$(call install,qwen3-vlm and the demo's packages,.[demo])

$(VENV)/.installed-later: pyproject.toml constraints.txt | $(BIN)/python
	$(call install,qwen3-vlm$(comma) the demo's packages and a recogniser of speech,.[demo$(comma)asr])

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(call install,qwen3-vlm and the development tools,.[dev$(comma)demo])
	$(call install_alone,$(LMMS_EVAL))
	@touch $(VENV)/.installed-demo $(VENV)/.installed-later

comma := ,
