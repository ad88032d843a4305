# make demo: the whole pipeline on a tiny model. make test, test-engines, lint: what CI runs. All set themselves up.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo test test-engines lint format bench clean

demo: $(INSTALLED)
	$(BIN)/python -m infra.demo

test: $(INSTALLED)
	infra/s3/ceph install
	$(BIN)/python -m pytest

test-engines: $(INSTALLED)
	infra/engines/install build/vllm
	$(BIN)/python -m pytest tests/engines

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

$(INSTALLED): pyproject.toml constraints.txt
	infra/venv $(PYTHON) .venv
	touch $@

clean:
	rm -rf build .venv
