# Everything happens in .venv, which is made when it is first needed. `make` prints what there is.

PYTHON         = python3
MODEL          = llava-tiny
WEIGHTS        = auto
TOKENS         =
LLM_TOKENS     =
SCHEDULE       = static
SELECTOR       = flowcut
PRECISION      = fp16
VISION_PRECISION =
CALIBRATION    =
STAGES         = 1
BACKEND        = auto
DECODER_LAYERS =
IMAGE          =
QUESTION       =
ARGS           =
PRUNED         =
BASELINE       =
BENCH          =
RESULTS        =
SCALE          = full
OUT            =

define HELP
make engine      export and compile MODEL into build/, ask it one question about one picture
make tiny        train llava-tiny from nothing into build/tiny-$(SCALE); goes on where it was interrupted
make bench       engine and its unpruned baseline, then latency of both, stage by stage, beside the FLOP limit
make results     measure every table of docs/results again: hours; RESULTS="prefill_latency plan" names some
make setup       install everything for development into .venv
make test        lint, then the tests that take seconds (no GPU, no network)
make test-long   the tests that take minutes
make soak        the hour-long versions of tests of threads, killed builds, damaged directories and odd input
make test-gpu    the tests that need a CUDA device; elsewhere each is skipped with the reason
make lint        ruff, mypy, import-linter
make format      let ruff rewrite the code
make clean       remove build/ and caches; make distclean: .venv too

Variables of make engine, as in `make engine MODEL=llava-1.5-7b TOKENS=128`:
  MODEL=$(MODEL)      a directory in the Hugging Face llava or llava_next format, or llava-1.5-7b, llava-1.5-13b,
                       llava-v1.6-vicuna-7b, llava-v1.6-vicuna-13b, llava-tiny
  WEIGHTS=$(WEIGHTS)          auto, or random: seeded weights at MODEL's true geometry, nothing is downloaded
  TOKENS=              visual tokens kept per picture; empty: 11.1% of the patches (64 of LLaVA-1.5's 576), or
                       160 of LLaVA-NeXT's 2880, half of them of each tile, then all inside the language model
  LLM_TOKENS=          LLaVA-1.5: of these, kept inside the language model after its second layer; empty: all
  SCHEDULE=$(SCHEDULE)      static, masked, or a schedule in a FILE.json
  SELECTOR=$(SELECTOR)     what chooses the patches: flowcut; less a part: no-history, no-semantic, no-strength; or
                       with SCHEDULE=static: cls (attention of the last layer alone), grid, random-SEED
  PRECISION=$(PRECISION)       fp16, bf16; int8 or int4 weights; fp8 (sm89 and later); fp32 with BACKEND=ort
  VISION_PRECISION=    the vision tower's, if not PRECISION; empty: int8 where PRECISION is int4
  CALIBRATION=         a file of `flowcut calibrate quantize`, for int4 and fp8; empty: the checkpoint's own, if any
  STAGES=$(STAGES)             graphs that the decoder is split into, so that compiling takes less memory
  BACKEND=$(BACKEND)         rtx (TensorRT-RTX), trt (TensorRT), ort (ONNX Runtime); auto: trt where it is installed and
                       a GPU is present, else rtx
  DECODER_LAYERS=      build only the first so many decoder layers; empty: all
  IMAGE=               the picture to ask about; empty: a bundled one
  QUESTION=            the question; empty: a bundled one
  ARGS=                anything else for `flowcut engine` (see .venv/bin/flowcut engine --help)
And of make bench:
  PRUNED=              an engine directory that is there already, instead of building it
  BASELINE=            the same of the unpruned one
  BENCH=               options for `flowcut bench` (see .venv/bin/flowcut bench --help), as BENCH="--peers --batch 1,4"
Variables of make results:
  RESULTS=             scripts of docs/results to run, without .py; empty: all of them
Variables of make tiny:
  SCALE=$(SCALE)           full, or smoke: the same path in a minute, which learns little
  OUT=                 the checkpoint to write; empty: build/tiny-$(SCALE)/llava-tiny
And for every target:
  PYTHON=$(PYTHON)       the Python that makes .venv; 3.11 or newer
endef

VENV   := .venv
BIN    := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest

# What each backend installs. TensorRT's own library is on NVIDIA's index only, hence not a default.
EXTRAS_ort  := export,cpu
EXTRAS_rtx  := export,cpu,rtx
EXTRAS_trt  := export,cpu,trt
EXTRAS_auto := $(EXTRAS_rtx)
comma       := ,
stamp        = $(VENV)/.installed-$(subst $(comma),-,$(1))
EXTRAS      := $(or $(EXTRAS_$(BACKEND)),$(EXTRAS_ort))
ENGINE      := $(call stamp,$(EXTRAS))
BENCHMARK   := $(call stamp,$(EXTRAS)$(comma)plot$(comma)peers)
DEV         := $(call stamp,dev)
# Types of TensorRT's Python interface, for a test. Not an extra: the package would pull another TensorRT in.
TYPES       := tensorrt-stubs==10.13.0.35.1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help engine bench tiny results setup test test-long soak test-gpu lint format clean distclean

help:
	@: $(info $(HELP))

# Through the environment and unexpanded, so that a question may hold quotes, spaces and dollars.
engine bench: export FLOWCUT_MODEL := $(value MODEL)
engine bench: export FLOWCUT_SCHEDULE := $(value SCHEDULE)
engine bench: export FLOWCUT_SELECTOR := $(value SELECTOR)
engine bench: export FLOWCUT_CALIBRATION := $(value CALIBRATION)
engine bench: export FLOWCUT_IMAGE := $(value IMAGE)
engine bench: export FLOWCUT_QUESTION := $(value QUESTION)

# Both engines of a benchmark, but for what prunes.
same = --weights $(WEIGHTS) --precision $(PRECISION) --backend $(BACKEND) \
  $(addprefix --vision-precision ,$(VISION_PRECISION)) --stages $(STAGES) \
  $${FLOWCUT_CALIBRATION:+--calibration "$$FLOWCUT_CALIBRATION"} \
  $(addprefix --decoder-layers ,$(DECODER_LAYERS)) --out-root build
own = $(addprefix --tokens ,$(TOKENS)) $(addprefix --llm-tokens ,$(LLM_TOKENS)) \
  --schedule "$$FLOWCUT_SCHEDULE" --selector "$$FLOWCUT_SELECTOR"
asked = $${FLOWCUT_IMAGE:+--image "$$FLOWCUT_IMAGE"} $${FLOWCUT_QUESTION:+--question "$$FLOWCUT_QUESTION"}

engine: $(ENGINE)
	@$(BIN)/flowcut engine "$$FLOWCUT_MODEL" $(own) $(same) --ask $(asked) $(ARGS)

# $(call built,options): build, show what is said, and give the directory's name to the shell.
built = $(BIN)/flowcut engine "$$FLOWCUT_MODEL" $(1) $(same) $(ARGS) | tee /dev/stderr | tail -n 1 | \
  $(BIN)/python -c 'import json, sys; print(json.load(sys.stdin)["directory"])'

bench: SHELL := bash
bench: .SHELLFLAGS := -o pipefail -ec
bench: export FLOWCUT_PRUNED := $(value PRUNED)
bench: export FLOWCUT_BASELINE := $(value BASELINE)
bench: $(BENCHMARK)
	@pruned=$${FLOWCUT_PRUNED:-$$($(call built,$(own)))}; \
	baseline=$${FLOWCUT_BASELINE:-$$($(call built,--tokens all))}; \
	$(BIN)/flowcut bench "$$pruned" --baseline "$$baseline" $(asked) $(BENCH)

tiny: export FLOWCUT_OUT := $(value OUT)
tiny: $(DEV)
	@$(BIN)/python -m flowcut.tiny --scale $(SCALE) $${FLOWCUT_OUT:+--out "$$FLOWCUT_OUT"}

# Each script says what it writes and how long it takes; those that measure time want an idle machine.
EVERY_RESULT := plan llava_next_flops flow_score_kernels score_parts training_curve fewer_points scoring_cost \
  accuracy_by_tokens llm_tokens schedules precision runtime_overhead prefill_latency full_size
results: export PYTHONPATH := tests
results: $(DEV)
	@set -e; for name in $(or $(RESULTS),$(EVERY_RESULT)); do echo "docs/results/$$name.py"; $(BIN)/python docs/results/$$name.py; done

setup: $(DEV)

test: lint
	$(PYTEST) -m "not long and not gpu and not soak" --cov --numprocesses auto --maxprocesses 4 --dist loadfile

test-long: $(DEV)
	$(PYTEST) -m "long and not gpu"

soak: $(DEV)
	$(PYTEST) -m soak -rs --durations=0

test-gpu: $(DEV)
	$(PYTEST) -m gpu -rs

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "PYTHON must be Python 3.11 or newer, got $(PYTHON) ($$($(PYTHON) --version 2>/dev/null || echo absent))." \
	    "Name one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { \
	  echo "$(PYTHON) must be able to make $(VENV), got the error above. Debian and Ubuntu: apt install python3-venv" \
	    >&2; exit 1; }
	@touch $@

$(VENV)/.installed-%: pyproject.toml | $(VENV)/.made
	@echo "Installing .[$(subst -,$(comma),$*)] into $(VENV). The first time this takes minutes, in silence."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$(subst -,$(comma),$*)]' || { \
	  echo "pip must be able to install .[$(subst -,$(comma),$*)], got the error above. TensorRT's library (BACKEND=trt)" \
	    "comes from pypi.nvidia.com; BACKEND=rtx and BACKEND=ort need only the package index." >&2; exit 1; }
	@$(if $(filter dev,$*),$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(TYPES))
	@touch $@

clean:
	rm -rf build .coverage .coverage.* .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
	find flowcut export engines calib tests -name __pycache__ -type d -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) *.egg-info
