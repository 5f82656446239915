# `make demo` and `make test` are all a newcomer needs; both build the environment first.
PYTHON ?= python3
BIN := .venv/bin
RUN := RAY_AUTH_MODE=token RAY_AUTH_TOKEN=$$($(BIN)/python -c 'import secrets; print(secrets.token_hex(32))')

.PHONY: setup demo serve test test-long check format clean

setup: .venv/ready

# The lock pins every version; pip takes a CPU build of the pinned torch where it is offered one. DeepSpeed's CPU
# Adam for the host is compiled here, once: workers that compile at first use wait for each other.
.venv/ready: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint requirements.lock pip
	$(BIN)/python -m pip install --quiet --constraint requirements.lock --editable '.[dev,bench]'
	$(BIN)/python -c 'from mlray.training.engine import build_operators; build_operators()'
	touch .venv/ready

demo: setup
	rm -rf runs/demo runs/sweep-sample runs/recommend-sample runs/demo-registry
	$(RUN) PYTHON=$(BIN)/python sh jobs/pipeline.sh runs runs/demo-registry
	@echo "plot        runs/demo/loss.png"
	@echo "sweep       runs/sweep-sample/dashboard.html"
	@echo "note        these models have learnt for minutes from 64 products: they show the way, not what mlray reaches"
	$(RUN) PYTHON=$(BIN)/python sh serve_app/try.sh runs/demo-registry

serve: setup
	$(RUN) $(BIN)/python -m serve_app release.registry_uri=runs/demo-registry

# Unit tests take a core each; the tests on a cluster share one.
test: setup
	$(RUN) OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile --ignore tests/cluster
	$(RUN) $(BIN)/python -m pytest tests/cluster -m 'not long'

test-long: setup
	$(RUN) $(BIN)/python -m pytest tests/cluster -m long

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_architecture.py

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv runs build .pytest_cache .mypy_cache .ruff_cache
