# `make` lists the targets with the comments that begin with ##. Each target installs what it needs.
# The quick tests leave out what is marked slow; TESTS='-k worker' chooses others. tests/README.md has more.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
EVALUATES := .venv/.evaluates
SERVES := .venv/.serves
DOCUMENTS := .venv/.documents
TESTS ?= -m "not slow"
SEED := $(shell date +%j)
PYTEST := $(BIN)/python -m pytest
# Three processes, since half of their time on two cores is waiting. Tests that share a server stay in one of them.
PARALLEL := -n 3 --dist loadgroup

PARTS := all-integration all-engines all-ui all-crash

.PHONY: help architectures docs docs-build docs-reference $(PARTS) all-unit install chromium demo plan-27b up down test test-unit test-all test-engines test-gpu test-ui test-crash lint format bench bench-gpu bench-store run-27b torture clean

## help: list the targets
help:
	@sed -n 's/^## \([a-z0-9-]*\): /\1\t/p' Makefile | expand -t 16

## demo: run the whole pipeline on a tiny model, on the CPU: two minutes
demo: $(INSTALLED)
	$(BIN)/python -m infra.dev.demo

## up: start Prefect with PostgreSQL, workers, S3 and a Hub stand-in on this machine
up: $(SERVES)
	$(BIN)/python -m infra.dev.stack up

## down: end what `make up` started; its data stays in build/stack
down:
	$(BIN)/python -m infra.dev.stack down

## plan-27b: print the plan of the 27 B recipe as JSON, from a stand-in that has its base's headers
plan-27b:
	@$(MAKE) --no-print-directory $(INSTALLED) >&2
	@$(BIN)/python -m infra.dev.plan $(BIN)/python -m requant plan deployments/recipes/qwen3.6-27b-int4.yaml --elsewhere --json

## install: install everything that is pinned into .venv
install: $(INSTALLED) $(EVALUATES) $(SERVES)

## chromium: install Chromium if it is missing
chromium:
	command -v chromium >/dev/null || apt-get install -y -q --no-install-recommends chromium

## test: run unit and integration tests: 8 minutes on two cores
test: $(INSTALLED) $(EVALUATES)
	infra/dev/s3/ceph install || { [ $$(id -u) != 0 ] && echo "without Ceph, the tests that need it are skipped"; }
	$(PYTEST) $(PARALLEL) $(TESTS)

## test-unit: run the unit tests: 2 minutes
test-unit: $(INSTALLED)
	$(PYTEST) tests/unit $(PARALLEL) $(TESTS)

## test-engines: load checkpoints in the real vLLM, which is installed first: 3.5 GB
test-engines: $(EVALUATES)
	infra/dev/engines/install build/vllm
	$(PYTEST) tests/engines $(TESTS)

## test-ui: walk through Prefect's pages in a browser
test-ui: $(SERVES) chromium
	$(PYTEST) tests/ui $(TESTS)

## test-crash: kill parts of a whole stack in the middle of a run
test-crash: $(SERVES)
	$(PYTEST) tests/crash $(TESTS)

## test-gpu: run the quantize stage on a GPU
test-gpu: $(INSTALLED)
	$(PYTEST) tests/gpu $(TESTS)

# Each part runs whatever came of those before it. The seed makes the same random order again: SEED=7.
## test-all: run every test that needs no GPU, and torture: some hours; SEED=7 repeats a random order
test-all: install
	$(MAKE) -k all-unit $(PARTS) torture SECONDS=120

all-unit:
	@echo "random order of seed $(SEED)"
	$(PYTEST) tests/unit $(PARALLEL) -p randomly --randomly-seed=$(SEED) --hypothesis-profile=many

$(PARTS): all-%:
	$(MAKE) $(if $(filter integration,$*),test TESTS=tests/integration,test-$* TESTS=)

## lint: run ruff and mypy
lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

## format: let ruff format and fix the code
format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

## bench: measure what Prefect, surgery, watch, publish and serving cost
bench: $(SERVES)
	$(BIN)/python -m infra.bench.overhead
	$(BIN)/python -m infra.bench.surgery
	$(BIN)/python -m infra.bench.watch
	$(BIN)/python -m infra.bench.publish
	$(BIN)/python -m infra.bench.served

## torture: let eight processes use one store and be killed at random; SECONDS=120 each way
torture: $(INSTALLED)
	infra/dev/s3/ceph install
	SECONDS=$(SECONDS) $(BIN)/python -m infra.bench.store_torture

## run-27b: take a model of Qwen3.6-27B's shapes through all stages on a GPU; again: go on; LAYERS=8 ITERS=50 MINUTES=9
run-27b: $(INSTALLED)
	$(BIN)/python -m infra.bench.whole --layers $(or $(LAYERS),64) --iters $(or $(ITERS),200) --minutes $(or $(MINUTES),9)

## bench-gpu: measure what quantizing 27 B costs on this GPU; MINUTES=9.5 in pieces, SEEDS=3 with more orders of samples
bench-gpu: $(INSTALLED)
	MINUTES=$(MINUTES) SEEDS=$(SEEDS) $(BIN)/python -m infra.bench.gpu

## bench-store: compare put and get with awscli, s3fs and boto3: 20 minutes; SIZE=256 REPEATS=2 is short
bench-store: $(INSTALLED)
	infra/dev/s3/ceph install
	SIZE=$(SIZE) FILES=$(FILES) REPEATS=$(REPEATS) MINUTES=$(MINUTES) $(BIN)/python -m infra.bench.store

$(INSTALLED): pyproject.toml constraints.txt
	infra/dev/venv $(PYTHON) .venv
	touch $@

$(EVALUATES): $(INSTALLED)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[eval]'
	touch $@

$(SERVES): $(INSTALLED)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[serve]'
	touch $@

## docs: serve the documentation as a site on http://127.0.0.1:8000
docs: $(DOCUMENTS)
	$(BIN)/mkdocs serve

# Without --quiet: with it, mkdocs counts no warnings, and --strict passes whatever is broken.
## docs-build: build the documentation into build/docs; a broken link or anchor is an error
docs-build: $(DOCUMENTS)
	$(BIN)/mkdocs build --strict

## docs-reference: write the reference pages that follow from the code
docs-reference: $(INSTALLED)
	$(BIN)/python -m infra.dev.docs

## architectures: describe the tensors of all language models that the pinned transformers knows (20 minutes)
architectures: $(INSTALLED)
	$(BIN)/python -W ignore -m infra.dev.architectures

$(DOCUMENTS): $(INSTALLED)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@

## clean: remove build and .venv
clean:
	rm -rf build .venv
