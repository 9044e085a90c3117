# Everything that a person or a machine does with this project. Each target is safe to repeat.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
PROTOS := $(shell find protos/tunery -name '*.proto')
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help

help: ## Show what there is.
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):[^#]*## /\1\t/' | \
		while IFS=$$'\t' read -r name text; do printf '  make %-8s %s\n' "$$name" "$$text"; done

# The models are asked for each time, since they lie in the user's cache and not in .venv.
setup: $(INSTALLED) ## Make .venv, install everything pinned, fetch the base models.
	@$(BIN)/tunery models pull smollm2-135m-instruct
	@$(BIN)/tunery models pull tunery-tiny

demo: setup ## Fine-tune a small model on a sample, and show what it has learnt.
	$(BIN)/tunery demo

test: setup check ## Run every check and every test.
	$(BIN)/python -m pytest

# Everything once more, on PostgreSQL, with ten times the made-up cases; then process after process is killed.
nightly: setup ## The tests on PostgreSQL with far more cases, chaos, and the audit. Hours.
	TUNERY_TEST_DATABASE=postgresql TUNERY_TEST_CASES=20000 $(BIN)/python -m pytest --timeout 7200
	$(MAKE) --no-print-directory chaos
	$(MAKE) --no-print-directory audit

check: $(INSTALLED) ## Lint, types, and the protos' rules.
	$(BIN)/ruff check
	$(BIN)/ruff format --check --quiet
	$(BIN)/mypy
	$(BIN)/buf lint
	$(BIN)/buf format --diff --exit-code --path protos/tunery
	$(MAKE) --no-print-directory breaking

# Against what others may have built on. Google's protos aren't in the history, so they are lent to it.
breaking: $(INSTALLED)
	@if git rev-parse --verify --quiet origin/main:buf.yaml >/dev/null; then \
		base=$$(mktemp -d) && trap 'rm -rf "$$base"' EXIT && \
		git archive origin/main buf.yaml protos | tar -x -C "$$base" && \
		cp -r protos/third_party "$$base/protos/" && \
		$(BIN)/buf breaking --against "$$base"; \
	fi

audit: $(INSTALLED) ## Ask PyPI which pinned versions have known vulnerabilities.
	$(BIN)/python deploy/audit_pins.py

protos: $(INSTALLED) ## Make the Python code from protos/ anew.
	$(BIN)/python hatch_build.py

bench: setup ## Measure, and keep the figures in bench/results/.
	$(PIP) --no-build-isolation --editable '.[bench]'
	$(BIN)/python bench/upload_throughput.py
	$(BIN)/python bench/gateway_rate.py
	$(BIN)/python bench/job_times.py
	$(BIN)/python bench/follow_log.py
	$(BIN)/python bench/many_jobs.py
	$(BIN)/python bench/mixed_use.py
	$(BIN)/python bench/id_timing.py
	$(BIN)/python bench/train_throughput.py --peer trl hf --method lora
	$(BIN)/python bench/train_throughput.py --peer trl --method full

# Some cells need root, for disks of their own; without it they are left out.
chaos: setup ## Break every part of a stack at every moment; keep what came of it in docs/reliability.md.
	$(BIN)/python -m tests.chaos
	$(BIN)/python -m tests.chaos --schedules 100 --stack postgresql

clean: ## Remove what the other targets made, base models aside.
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Debian's Python has no ensurepip unless python3-venv is installed too; its pip can then install another one.
$(VENV)/made:
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed"'
	if $(PYTHON) -c 'import ensurepip' 2>/dev/null; then $(PYTHON) -m venv $(VENV); else \
		$(PYTHON) -m venv --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install --quiet pip; fi
	@touch $@

# The tools that make code from the protos come first; the build then takes them from here, pinned.
$(INSTALLED): $(VENV)/made pyproject.toml constraints.txt hatch_build.py $(PROTOS)
	@echo 'installing into $(VENV) (some minutes the first time)'
	$(PIP) hatchling grpcio-tools googleapis-common-protos
	$(PIP) --no-build-isolation --editable '.[dev,wandb,bitsandbytes]'
	@touch $@

.PHONY: help setup demo test nightly check breaking audit protos bench chaos clean
