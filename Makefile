# make demo: the whole pipeline on a tiny model. All targets set themselves up.
# make test: unit and integration tests, 8 minutes on two cores; make test-unit: the first of them, 2 minutes.
# make test-engines (the real vLLM), test-ui (the pages in a browser), test-crash (a kill): what CI runs beside them.
# These leave out what is marked slow; TESTS='-k worker' chooses others. tests/README.md has more.
# make test-all: every test that needs no GPU, and torture: some hours. make test-gpu: the quantize stage on a GPU.
# make up, make down: Prefect with PostgreSQL, workers, S3 and a Hub stand-in on this machine.
# make plan-27b: the plan of the 27 B recipe as JSON, against a stand-in that has its base's headers. Nothing else on stdout.
# make torture: eight processes put, get, list and collect in one store and are killed at random; SECONDS=120 each way.
# make bench-gpu: what quantizing a 27 B model costs on this machine's GPU; MINUTES=9.5 does it in pieces,
# SEEDS=3 compares the losses with more orders of the samples.
# make bench-store: put and get on a local Ceph beside awscli, s3fs and boto3: 20 minutes; SIZE=256 REPEATS=2 is a short one.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
EVALUATES := .venv/.evaluates
SERVES := .venv/.serves
TESTS ?= -m "not slow"
SEED := $(shell date +%j)
PYTEST := $(BIN)/python -m pytest
PARALLEL := -n 2 --dist loadgroup # two processes; tests that share a server stay in one of them

PARTS := all-integration all-engines all-ui all-crash

.PHONY: $(PARTS) all-unit install chromium demo plan-27b up down test test-unit test-all test-engines test-gpu test-ui test-crash lint format bench bench-gpu bench-store torture clean

demo: $(INSTALLED)
	$(BIN)/python -m infra.dev.demo

up: $(SERVES)
	$(BIN)/python -m infra.dev.stack up

down:
	$(BIN)/python -m infra.dev.stack down

plan-27b:
	@$(MAKE) --no-print-directory $(INSTALLED) >&2
	@$(BIN)/python -m infra.dev.plan $(BIN)/python -m requant plan deployments/recipes/qwen3.6-27b-int4.yaml --elsewhere --json

install: $(INSTALLED) $(EVALUATES) $(SERVES)

chromium:
	command -v chromium >/dev/null || apt-get install -y -q --no-install-recommends chromium

test: $(INSTALLED) $(EVALUATES)
	infra/dev/s3/ceph install || { [ $$(id -u) != 0 ] && echo "without Ceph, the tests that need it are skipped"; }
	$(PYTEST) $(PARALLEL) $(TESTS)

test-unit: $(INSTALLED)
	$(PYTEST) tests/unit $(PARALLEL) $(TESTS)

test-engines: $(INSTALLED)
	infra/dev/engines/install build/vllm
	$(PYTEST) tests/engines $(TESTS)

test-ui: $(SERVES) chromium
	$(PYTEST) tests/ui $(TESTS)

test-crash: $(SERVES)
	$(PYTEST) tests/crash $(TESTS)

test-gpu: $(INSTALLED)
	$(PYTEST) tests/gpu $(TESTS)

# Each part runs whatever came of those before it. The seed makes the same random order again: SEED=7.
test-all: install
	$(MAKE) -k all-unit $(PARTS) torture SECONDS=120

all-unit:
	@echo "random order of seed $(SEED)"
	$(PYTEST) tests/unit $(PARALLEL) -p randomly --randomly-seed=$(SEED) --hypothesis-profile=many

$(PARTS): all-%:
	$(MAKE) $(if $(filter integration,$*),test TESTS=tests/integration,test-$* TESTS=)

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
	infra/dev/s3/ceph install
	SECONDS=$(SECONDS) $(BIN)/python -m infra.bench.store_torture

bench-gpu: $(INSTALLED)
	MINUTES=$(MINUTES) SEEDS=$(SEEDS) $(BIN)/python -m infra.bench.gpu

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

clean:
	rm -rf build .venv
