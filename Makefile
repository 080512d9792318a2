# Everything runs in .venv, which `make install` builds from requirements.lock.

.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules

PYTHON ?= python3
CONFIG ?= configs/quickstart.yaml
CHECKPOINT ?= runs/quickstart/checkpoint
DATA ?=
PLACE = $(if $(findstring ://,$(DATA)),$(DATA),$(abspath $(DATA)))

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
UV_PIP := $(BIN)/uv pip install --python $(BIN)/python

# Ray and torch find ninja and their other tools here, as do the worker processes they start.
export PATH := $(CURDIR)/$(BIN):$(PATH)
# DeepSpeed's compiled operators live and die with the environment.
export TORCH_EXTENSIONS_DIR := $(CURDIR)/$(VENV)/torch_extensions
# Without a working GPU DeepSpeed must be told so, or it probes for one.
ifeq ($(shell nvidia-smi -L 2>/dev/null | grep -c '^GPU'),0)
export DS_ACCELERATOR ?= cpu
endif

.PHONY: help
help: ## List the targets.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

.PHONY: install
install: $(STAMP) ## Make .venv with the locked versions and compile DeepSpeed's CPU operator.

$(BIN)/uv:
	@$(PYTHON) -c 'import sys; v = sys.version_info; (3, 11) <= v < (3, 14) or sys.exit(f"Tina needs Python 3.11 to 3.13, and $(PYTHON) is {v.major}.{v.minor}: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv

$(STAMP): requirements.lock pyproject.toml | $(BIN)/uv
	$(UV_PIP) --compile-bytecode -r requirements.lock
	$(UV_PIP) --no-deps -e .
ifeq ($(DS_ACCELERATOR),cpu)
	$(BIN)/python -c 'from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder as Op; op = Op(); op.is_compatible() and op.load(verbose=False)'
endif
	@touch $@

.PHONY: demo
demo: install ## Zoo, training, generation and report on the embedded digits; CONFIG=, DATA= for others.
	$(if $(DATA),TINA_DATA='$(PLACE)') $(BIN)/python -m ray_jobs.quickstart --config $(CONFIG) --storage $(CURDIR)/runs

.PHONY: serve
serve: install ## Serve the quickstart's checkpoint on http://localhost:8000; PORT= another, CHECKPOINT= a folder or a packaged name, ENCODER=sentence for any text.
	@$(BIN)/tina info '$(CHECKPOINT)' || { echo 'make demo trains one; make serve CHECKPOINT=tina-cifar100-cnn5k takes one that comes with Tina' >&2; exit 2; }
	$(BIN)/python -m serve $(if $(PORT),--port $(PORT)) checkpoint='$(or $(realpath $(CHECKPOINT)),$(CHECKPOINT))' storage=$(CURDIR)/runs/serve $(if $(ENCODER),encoder=$(ENCODER))

.PHONY: bench
bench: install ## Measure start-up and generation in their short forms; CHECKPOINT= a folder or a packaged name.
	$(BIN)/python -m benchmarks.startup --short --checkpoint $(CHECKPOINT)
	$(BIN)/python -m benchmarks.generation --short --checkpoint $(CHECKPOINT)

.PHONY: reproduce
reproduce: export TINA_DATA := $(or $(PLACE),$(TINA_DATA))
reproduce: install ## All that is published on real data, with DATA= or TINA_DATA; reckoned at eleven hours with bf16 in hardware.
	for preset in cifar100_cnn5k cifar100_cnn5k_all cifar100_cnn5k_ways cifar100_cnn15k cifar100_cnn33k cifar100_resnet20_head cifar100_efficientnet_head mini_imagenet_cnn5k cifar100_mini_imagenet_cnn5k cifar100_mini_imagenet_resnet20_head caltech101_cnn5k caltech101_efficientnet_head; do $(MAKE) demo CONFIG=configs/$$preset.yaml; done
	for job in build_zoo train; do $(BIN)/python -m ray_jobs.$$job --config configs/cifar100_cnn5k.yaml --storage $(CURDIR)/runs \
		--name cifar100_cnn5k_regressor --diffusion.schedule none --diffusion.timesteps 1 --diffusion.sampling_steps 1; done
	$(BIN)/python -m ray_jobs.evaluate --config configs/cifar100_cnn5k.yaml --storage $(CURDIR)/runs \
		--evaluation.direct_tasks 100 --evaluation.direct_tasks_elsewhere 20 --evaluation.regressor cifar100_cnn5k_regressor
	$(BIN)/python -m benchmarks.objectives runs/cifar100_cnn5k --steps 600
	$(BIN)/python -m benchmarks.prompts runs/cifar100_cnn5k
	$(BIN)/python -m benchmarks.elsewhere tina-cifar100-cnn5k tina-cifar100-efficientnet-head tina-cifar100-resnet20-head tina-cifar100-mini-imagenet-cnn5k tina-cifar100-mini-imagenet-resnet20-head --data caltech101
	$(BIN)/python -m benchmarks.sizes runs/cifar100_cnn5k --steps 600

.PHONY: test
test: install ## Run the default test suite.
	$(BIN)/python -m pytest -m "not slow and not browser and not gpu"

.PHONY: test-all
test-all: install ## Run the slow and the browser tests too.
	$(BIN)/python -m pytest -m "not gpu"

.PHONY: check
check: install ## Lint, format and types, scripts and Dockerfile too, without changing a file.
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/shellcheck --external-sources .ci/run cluster/local/*.sh
	$(BIN)/hadolint cluster/Dockerfile

.PHONY: format
format: install ## Sort imports, mend what ruff can, format.
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

.PHONY: lock
lock: $(BIN)/uv ## Resolve pyproject.toml into requirements.lock, keeping versions that still fit; UPGRADE=--upgrade.
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --fork-strategy fewest \
		--no-emit-index-url --no-emit-find-links --custom-compile-command "make lock" \
		--extra ray --extra serve --extra client --extra sentence --extra imagenet --extra dev $(UPGRADE) pyproject.toml -o requirements.lock

.PHONY: clean
clean: ## Remove caches and builds; .venv and runs stay.
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
