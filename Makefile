# make demo: the whole pipeline on a tiny model. make test, test-engines, lint: what CI runs. All set themselves up.
# make test-gpu: tests of the quantize stage that need a GPU.
# make bench-gpu: what quantizing a 27 B model costs on this machine's GPU; MINUTES=9.5 does it in pieces.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
EVALUATES := .venv/.evaluates

.PHONY: demo test test-engines test-gpu lint format bench bench-gpu clean

demo: $(INSTALLED)
	$(BIN)/python -m infra.demo

test: $(INSTALLED) $(EVALUATES)
	infra/s3/ceph install
	$(BIN)/python -m pytest

test-engines: $(INSTALLED)
	infra/engines/install build/vllm
	$(BIN)/python -m pytest tests/engines

test-gpu: $(INSTALLED)
	$(BIN)/python -m pytest tests/gpu

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED)
	$(BIN)/python -m infra.bench.overhead
	$(BIN)/python -m infra.bench.surgery
	$(BIN)/python -m infra.bench.publish

bench-gpu: $(INSTALLED)
	MINUTES=$(MINUTES) $(BIN)/python -m infra.bench.gpu

$(INSTALLED): pyproject.toml constraints.txt
	infra/venv $(PYTHON) .venv
	touch $@

$(EVALUATES): $(INSTALLED)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[eval]'
	touch $@

clean:
	rm -rf build .venv
