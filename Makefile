# Two commands do everything: `make demo` and `make test`. Both make the virtual environment they need.
PYTHON ?= python3
VENV   := .venv
CONSTRAINTS := constraints.txt
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint $(CONSTRAINTS)
TESTS  := tests/core
# A worker that crashes ends the run: with its tests given to a new one, `loadgroup` waits for them for ever.
PYTEST := -m pytest --numprocesses auto --dist loadgroup --max-worker-restart 0
SOURCE := $(shell find core plugins adapters policies -type f -not -path '*/__pycache__/*') pyproject.toml README.md LICENSE

.PHONY: demo test test-oldest test-newest test-quantized test-trl test-trl-older test-deepspeed test-vllm test-lmms test-extras docs troubleshooting results results-video check format clean

demo: $(VENV)/.wheel
	$(BIN)/dropflow run

# The suite runs on the installed wheel, not on the source tree, file by file on every core. FLAGS="-m slow" runs the
# heavy matrices.
test: check
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) $(FLAGS)

# An environment of other versions or with more packages, `.venvs/NAME`; environments/NAME.txt says which.
env-%: .venvs/%.txt
	$(MAKE) VENV=.venvs/$* CONSTRAINTS=$< .venvs/$*/.dev
	.venvs/$*/bin/python -m pip --disable-pip-version-check install --quiet --constraint $< -r environments/$*.txt

.PRECIOUS: .venvs/%.txt
.venvs/%.txt: environments/%.txt environments/constraints.py constraints.txt
	mkdir -p .venvs
	$(PYTHON) environments/constraints.py $* > $@

# The engine's own tests on the oldest and the newest transformers that are supported. TESTS=tests runs them all.
test-oldest test-newest test-quantized test-trl test-trl-older test-deepspeed: test-%: env-%
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 .venvs/$*/bin/python $(PYTEST) $(TESTS) $(FLAGS)

# Models with quantised weights, with the libraries that make them.
test-quantized: TESTS := tests/core/stacks/test_quantized.py

# TRL's trainers.
test-trl test-trl-older: TESTS := tests/core/stacks/test_trl.py

# Training on two ranks by DeepSpeed, too.
test-deepspeed: TESTS := tests/lab/finetune/test_processes.py
test-deepspeed: override FLAGS += -m "slow or not slow"

# Policies in vLLM, against the answers of the engine: two environments, since their ranges of transformers do not meet.
test-vllm: $(VENV)/.dev .venvs/vllm/.ready
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python tests/served/ask_engine.py .venvs/vllm-asked
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PYTHONPATH=tests/served/site DROPFLOW_ASKED=.venvs/vllm-asked \
		.venvs/vllm/bin/python -m pytest --confcutdir tests/served --override-ini filterwarnings= \
		--override-ini pythonpath= --timeout 1200 tests/served $(FLAGS)

# torch first, as above; then out go packages that are built for CUDA and needed by nothing here.
VLLM_PIP := .venvs/vllm/bin/python -m pip --disable-pip-version-check
.venvs/vllm/.packages: .venvs/vllm.txt
	$(PYTHON) -m venv .venvs/vllm
	$(VLLM_PIP) install --quiet --constraint $< torch
	$(VLLM_PIP) install --quiet --constraint $< -r environments/vllm.txt jaxtyping pluggy pytest pytest-timeout hatchling
	$(VLLM_PIP) uninstall --quiet --yes torchaudio torchcodec
	touch $@

.venvs/vllm/.ready: .venvs/vllm/.packages $(SOURCE) $(wildcard distributions/vllm/*)
	rm -rf .venvs/vllm/dist
	$(VLLM_PIP) wheel --quiet --no-deps --no-build-isolation --wheel-dir .venvs/vllm/dist distributions/vllm
	$(VLLM_PIP) install --quiet --force-reinstall --no-deps .venvs/vllm/dist/*.whl
	touch $@

# lmms-eval, in one process and in two. It pulls in torchvision, whose wheel is made for CUDA and breaks on a CPU build of
# torch; without it, transformers prepares pictures by Pillow.
test-lmms: env-lmms
	.venvs/lmms/bin/python -m pip --disable-pip-version-check uninstall --quiet --yes torchvision
	HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 OMP_NUM_THREADS=1 .venvs/lmms/bin/python $(PYTEST) tests/adapters/lmms $(FLAGS)

# Every extra alone: a fresh environment each, with the wheel and nothing else, in which what the extra is for is used
# once. EXTRAS="serve tune" checks these.
test-extras: $(VENV)/.wheel
	$(BIN)/python environments/extras.py dist/*.whl $(EXTRAS)

# The documents as a site, in `site`; no network. To read it while writing: `.venv/bin/mkdocs serve`.
docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The tables of docs/troubleshooting.md, from the messages in the source code.
troubleshooting: $(VENV)/.dev
	$(BIN)/python docs/refusals.py

# Every installed policy on the two dense embedded models, one process for each, into docs/results.md; what is finished is
# not measured again.
COMPARE := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/dropflow compare --questions 250 --timed 2 --positions both \
	--out results --policies all,docs/results/mustdrop-57.yaml,docs/results/mustdrop-43.yaml --models
results: $(VENV)/.dev
	$(COMPARE) dense-plain & first=$$!; $(COMPARE) dense; wait $$first
	$(COMPARE) dense,dense-plain --into docs/results.md
	cp results/compare.png docs/results/compare.png

# The methods for videos on the clips of the embedded model, into docs/video.md.
CLIPS := $(patsubst %,docs/results/clips/%.yaml,evs-25 vidcom2-25 flashvid-25 holitom-25 stride-25 frames-25 dycoke-70 \
	stride-46 frames-46)
comma := ,
empty :=
results-video: $(VENV)/.dev
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/dropflow compare --data clips --questions 270 --seed 1 --timed 0 --max-new-tokens 3 \
		--by-kind --out results-video --into docs/video.md --policies $(subst $(empty) $(empty),$(comma),$(CLIPS))

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .venvs dist build site .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(VENV)/.python:
	$(PYTHON) -m venv $(VENV)
	touch $@

# torch first: a bare `torch` requirement would otherwise be free to take the newest build
$(VENV)/.deps: $(VENV)/.python $(CONSTRAINTS) pyproject.toml
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
