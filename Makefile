# Every target sets itself up from nothing: a clone and one command are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-compose compose-chaos check protos bench clean

$(STAMP): pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (once)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/moe-coordinator local --peers 3 --trainers 1 --kill-peer-at-step 150 --out runs/demo

test: $(STAMP)
	$(BIN)/python -m pytest

# The containers of docker/, on an engine that runs already or on one that is started for this.
test-compose: $(STAMP)
	docker/tests/install-engine
	$(BIN)/python -m pytest docker/tests

# Five minutes of docker/chaos.toml for a swarm in containers; fails when training does not take it.
compose-chaos: $(STAMP)
	docker/tests/install-engine
	$(BIN)/python docker/tests/support/composed_chaos.py

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python protos/generate.py --check

protos: $(STAMP)
	$(BIN)/python protos/generate.py

bench: $(STAMP)
	$(BIN)/python benchmarks/discovery.py
	$(BIN)/python benchmarks/failures.py
	$(BIN)/python benchmarks/hedging.py
	$(BIN)/python benchmarks/latency.py
	$(BIN)/python benchmarks/overload.py
	$(BIN)/python benchmarks/recovery.py
	$(BIN)/python benchmarks/replicas.py
	$(BIN)/python benchmarks/vs_hivemind.py
	$(BIN)/python benchmarks/wire.py

clean:
	rm -rf $(VENV) runs
