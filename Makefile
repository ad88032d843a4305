# make demo: the whole pipeline on a tiny model. make test, test-engines, lint: what CI runs. All set themselves up.
# make up, make down: Prefect with PostgreSQL, workers, S3 and a Hub stand-in on this machine. make test-ui: its pages in a
# browser. make test-crash: everything killed in the middle of a run, 25 minutes; TESTS='-k worker' is some of it.
# make plan-27b: the plan of the 27 B recipe as JSON, against a stand-in that has its base's headers. Nothing else on stdout.
# make test-gpu: tests of the quantize stage that need a GPU.
# make torture: eight processes put, get, list and collect in one store and are killed at random; SECONDS=120 each way.
# make bench-gpu: what quantizing a 27 B model costs on this machine's GPU; MINUTES=9.5 does it in pieces,
# SEEDS=3 compares the losses with more orders of the samples.
# make bench-store: put and get on a local Ceph beside awscli, s3fs and boto3: 20 minutes; SIZE=256 REPEATS=2 is a short one.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
EVALUATES := .venv/.evaluates
SERVES := .venv/.serves

.PHONY: demo plan-27b up down test test-engines test-gpu test-ui test-crash lint format bench bench-gpu bench-store torture clean

demo: $(INSTALLED)
	$(BIN)/python -m infra.demo

up: $(SERVES)
	$(BIN)/python -m infra.stack up

down:
	$(BIN)/python -m infra.stack down

plan-27b:
	@$(MAKE) --no-print-directory $(INSTALLED) >&2
	@$(BIN)/python -m infra.plan $(BIN)/python -m flows.cli plan deployments/recipes/qwen3.6-27b-int4.yaml --elsewhere --json

test: $(INSTALLED) $(EVALUATES)
	infra/s3/ceph install
	$(BIN)/python -m pytest

test-engines: $(INSTALLED)
	infra/engines/install build/vllm
	$(BIN)/python -m pytest tests/engines

test-ui: $(SERVES)
	command -v chromium >/dev/null || apt-get install -y -q --no-install-recommends chromium
	$(BIN)/python -m pytest tests/ui

test-crash: $(SERVES)
	$(BIN)/python -m pytest tests/crash $(TESTS)

test-gpu: $(INSTALLED)
	$(BIN)/python -m pytest tests/gpu

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(SERVES)
	$(BIN)/python -m infra.bench.overhead
	$(BIN)/python -m infra.bench.surgery
	$(BIN)/python -m infra.bench.watch
	$(BIN)/python -m infra.bench.publish
	$(BIN)/python -m infra.bench.served

torture: $(INSTALLED)
	infra/s3/ceph install
	SECONDS=$(SECONDS) $(BIN)/python -m infra.bench.store_torture

bench-gpu: $(INSTALLED)
	MINUTES=$(MINUTES) SEEDS=$(SEEDS) $(BIN)/python -m infra.bench.gpu

bench-store: $(INSTALLED)
	infra/s3/ceph install
	SIZE=$(SIZE) FILES=$(FILES) REPEATS=$(REPEATS) MINUTES=$(MINUTES) $(BIN)/python -m infra.bench.store

$(INSTALLED): pyproject.toml constraints.txt
	infra/venv $(PYTHON) .venv
	touch $@

$(EVALUATES): $(INSTALLED)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[eval]'
	touch $@

$(SERVES): $(INSTALLED)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[serve]'
	touch $@

clean:
	rm -rf build .venv
