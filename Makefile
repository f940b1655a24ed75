# `make` or `make help` lists the targets. Variables can be set on the command line:
#   DEVICE=cpu|cuda   what to install for (default: what this machine has)
#   EXTRAS=server     without the test tools (default: server,test; for demo and serve server)
#   PYTHON=...        the Python 3.11 or newer that .venv is made from
#   TAG=v1.2.3        the release that `make dist` builds
#   MODEL=... ARGS=...  what `make serve` serves, and further arguments for it (or for the demo, or pytest)

NEW_ENOUGH := -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
ifndef PYTHON
PYTHON := $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p $(NEW_ENOUGH) && echo $$p && break; done)
endif
DEVICE ?=
# An environment that has more keeps it.
ifeq ($(filter-out demo serve,$(or $(MAKECMDGOALS),help)),)
EXTRAS ?= server
endif
EXTRAS ?= server,test
DEMO_MODEL := examples/demo_model/checkpoint
# Without a size vLLM asks for most of the memory, and does not start where something else uses it.
DEMO_DTYPE := $(if $(shell command -v nvidia-smi),bfloat16,float32)
DEMO_ARGS := --dtype $(DEMO_DTYPE) --max-model-len 32768 --kv-cache-memory-bytes 256M --gpu-memory-utilization 0.1 \
	--enable-force-include-usage --enable-prompt-tokens-details
TAG ?=
MODEL ?= $(DEMO_MODEL)
ARGS ?=

BIN := .venv/bin
NOT_HERE := not soak and not browser and not container and not cluster and not gpu and not nixl

# Two files at once, those with servers first: a server and a test of it seldom use two cores. ARGS='-n 0' runs one after the other.
TWO_AT_ONCE := -n 2 --dist loadfile --no-loadscope-reorder

export VLLM_NO_USAGE_STATS := 1
# Without bytecode in .venv each of a server's processes takes twice as long to import vLLM: 20 s instead of 10.
unexport PYTHONDONTWRITEBYTECODE
# Nothing of the demo and the tests comes from a model hub.
demo test test-unit test-all newer-vllm soak: export HF_HUB_OFFLINE := 1

.PHONY: help install lock demo serve lint test test-unit test-all newer-vllm docs dist soak clean
.DEFAULT_GOAL := help

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

install: ## make .venv and install vLLM and this project in it
	@$(or $(PYTHON),false) $(NEW_ENOUGH) || { echo 'make install: Python 3.11 or newer is missing: install it' \
	'(Debian: apt install python3 python3-venv), or name one with PYTHON=...' >&2; exit 1; }
	@$(PYTHON) -m deploy.install --device '$(DEVICE)' --extras '$(EXTRAS)'

lock: install ## renew the versions that an install takes (ARGS=--upgrade: the newest)
	@$(BIN)/python -m deploy.install.lock $(ARGS)

demo: install ## serve a small trained model, ask it about a log, leave a page open (ARGS=--once: end)
	@$(BIN)/kimi-linear demo $(ARGS)

serve: install ## keep `vllm serve $(MODEL) $(ARGS)` running (default: the demo model)
ifeq ($(MODEL),$(DEMO_MODEL))
	@exec $(BIN)/vllm serve $(MODEL) $(DEMO_ARGS) $(ARGS)
else
	@exec $(BIN)/vllm serve $(MODEL) $(ARGS)
endif

lint: install ## ruff and mypy
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .
	@$(BIN)/mypy

test: lint ## lint, and every test that needs no special tool
	@$(BIN)/pytest $(TWO_AT_ONCE) -m '$(NOT_HERE)' $(ARGS)

test-unit: install ## the tests that start no server and build no engine, in two minutes
	@$(BIN)/pytest $(TWO_AT_ONCE) tests/unit -m '$(NOT_HERE)' $(ARGS)

test-all: install ## every tier whose tool is present; prints what ran
	@$(BIN)/python tests/run_all.py

newer-vllm: install ## what would not fit the newest vLLM (ARGS='--vllm 0.34.0': another)
	@$(BIN)/python -m tests.newer_vllm $(ARGS)

docs: install ## the documents as a site in build/site
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo 'build/site/index.html'

dist: install ## the sdist and the wheel in dist/ (TAG=v1.2.3: checked against version and changelog)
	@$(BIN)/python -m deploy.release --tag '$(TAG)'

soak: install ## random traffic for 30 minutes, or ARGS='--minutes 8': no crash, no wrong answer, no leak
	@$(BIN)/python -m tests.soak $(if $(shell command -v nvidia-smi),--gpu) $(ARGS)

clean: ## remove .venv, the demo checkpoint and build output
	@rm -rf .venv .venv.lock .demo build dist *.egg-info deploy/cpu-alias/build deploy/cpu-alias/*.egg-info
	@rm -f kernels/kda_kernels/cpu/_kda*.so
