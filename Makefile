# The commands of the house. `make` alone lists them.
#
# Nothing is written outside the checkout but the model, which goes to the user's cache.

SHELL := /usr/bin/env bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

BIN := .venv/bin
MODEL := smollm2-135m
PACKAGES := .venv/.kvstrata-setup
DEV_PACKAGES := .venv/.kvstrata-dev
CODE := kvstore engine prefill decode router cli tests $(wildcard benchmarks examples)

.PHONY: help
help:  ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# --- use -----------------------------------------------------------------------------------------------------

.PHONY: setup
setup: $(PACKAGES)  ## make .venv, install, fetch the default model
	@$(BIN)/kvstrata model pull $(MODEL)

.PHONY: demo
demo: setup  ## serve a conversation through the store and check every token of it
	@$(BIN)/kvstrata demo

.PHONY: test
test: setup  ## run the tests (offline once set up)
	$(BIN)/python -m pytest -m "not vllm"

.PHONY: test-vllm
test-vllm: setup  ## the connector under real vLLM, installed if it can be (3 GB); what fails is run twice
	@if $(BIN)/python -m cli.bench.peers.vllm_environment; \
	then $(BIN)/python -m pytest -m vllm tests/vllm \
	|| $(BIN)/python -m pytest -m vllm tests/vllm --last-failed --last-failed-no-failures none; \
	else echo "test-vllm: nothing was run, for the reason above"; fi

$(PACKAGES): pyproject.toml constraints.txt
	@scripts/setup.sh serve,test
	@touch $@

$(DEV_PACKAGES): $(PACKAGES)
	@scripts/setup.sh serve,test,dev
	@touch $@

# --- verify and fix ------------------------------------------------------------------------------------------

.PHONY: verify
verify: verify-format verify-lint verify-types verify-imports verify-protos verify-helm verify-readme  ## all checks but the tests
	@echo "verify: all good"

.PHONY: verify-format
verify-format: $(DEV_PACKAGES)  ## the code is formatted
	$(BIN)/ruff format --check $(CODE)

.PHONY: verify-lint
verify-lint: $(DEV_PACKAGES)  ## ruff finds nothing
	$(BIN)/ruff check $(CODE)

.PHONY: verify-types
verify-types: $(DEV_PACKAGES)  ## mypy --strict finds nothing
	$(BIN)/mypy $(CODE)

.PHONY: verify-imports
verify-imports: $(DEV_PACKAGES)  ## the law of imports holds
	$(BIN)/lint-imports

.PHONY: verify-protos
verify-protos: $(DEV_PACKAGES)  ## protos lint clean, generated code current
	$(BIN)/buf lint
	@fresh=$$(mktemp -d); trap 'rm -rf "$$fresh"' EXIT; \
	  scripts/protos.sh "$$fresh"; \
	  diff -r -x __init__.py -x __pycache__ "$$fresh/kvstore/v1" kvstore/v1 || \
	  { echo "kvstore/v1 is not what protos/ generates: run 'make fix-protos' and commit it" >&2; exit 1; }

.PHONY: verify-helm
verify-helm: $(PACKAGES)  ## the chart renders, lints and meets the schemas
	$(BIN)/python -m pytest -q tests/helm

.PHONY: verify-readme
verify-readme: $(PACKAGES)  ## the README's tree and all links are true
	$(BIN)/python -m pytest -q tests/house/test_readme.py tests/house/test_links.py

.PHONY: fix
fix: fix-format fix-protos  ## mend what a tool can mend

.PHONY: fix-format
fix-format: $(DEV_PACKAGES)  ## format, and apply ruff's safe fixes
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

.PHONY: fix-protos
fix-protos: $(PACKAGES)  ## generate kvstore/v1 from protos/
	scripts/protos.sh .
