# Two commands do everything: `make demo` and `make test`. Both make the virtual environment they need.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
SOURCE := $(shell find core plugins adapters policies -type f -not -path '*/__pycache__/*') pyproject.toml README.md LICENSE

.PHONY: demo test test-oldest check format clean

demo: $(VENV)/.wheel
	$(BIN)/dropflow run

# The suite runs on the installed wheel, not on the source tree. FLAGS="-m slow" runs the heavy matrices.
test: check
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(FLAGS)

# The engine's own tests on the oldest supported transformers, in an environment of their own.
test-oldest: $(VENV)/.wheel
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt torch
	sed 's/^transformers==.*/transformers==5.20.0/; /^tokenizers==/d' constraints.txt > $(VENV)-oldest/constraints.txt
	$(VENV)-oldest/bin/python -m pip --disable-pip-version-check install --quiet \
		--constraint $(VENV)-oldest/constraints.txt "$$(ls dist/*.whl)[dev]"
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(VENV)-oldest/bin/python -m pytest tests/core $(FLAGS)

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(VENV)-oldest dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(VENV)/.python:
	$(PYTHON) -m venv $(VENV)
	touch $@

# torch first: a bare `torch` requirement would otherwise be free to take the newest build
$(VENV)/.deps: $(VENV)/.python constraints.txt pyproject.toml
	$(PIP) torch
	touch $@

$(VENV)/.wheel: $(VENV)/.deps $(SOURCE)
	rm -rf dist
	$(BIN)/python -m pip --disable-pip-version-check wheel --quiet --no-deps --wheel-dir dist .
	$(PIP) "$$(ls dist/*.whl)"
	$(PIP) --force-reinstall --no-deps "$$(ls dist/*.whl)"
	touch $@

$(VENV)/.dev: $(VENV)/.wheel
	$(PIP) "$$(ls dist/*.whl)[dev]"
	touch $@
