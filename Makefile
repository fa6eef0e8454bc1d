# `make` alone lists the targets. A recipe that fails with, say, 69 is shown as "Error 69"; make itself then exits with 2.
MODEL ?= gemma3:270m
ARGS ?=

# What a user puts into MODEL or ARGS may hold quotes, backticks or $(shell ...). It reaches the program as an environment
# variable: `value` takes it unexpanded, and neither make nor a shell ever evaluates it. make would pass variables of its
# command line on as well, after expanding them: the two lines after `export` stop that.
export COMMAND_ARGS := $(value ARGS)
unexport MODEL ARGS model
MAKEOVERRIDES :=

PYTHON := .venv/bin/python

.DEFAULT_GOAL := help
.PHONY: help setup tools calibrate recalibrate test test-gpu lint format type bench bench-accuracy bench-devices bench-drift bench-faults bench-fuzz bench-header bench-red-team bench-mutants bench-verdicts test-engines schema lock clean distclean docs reference release screenshots stories

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "  calibrate takes MODEL=NAME (gemma3:270m; model=NAME is the same); calibrate and test take ARGS='more options'."

setup: ## Create or refresh .venv with what calibrating needs (the others do it themselves)
	@sh scripts/setup.sh $(if $(filter setup,$(MAKECMDGOALS)),,--quiet)

tools: ## The same, with what tests and checks need
	@sh scripts/setup.sh --dev $(if $(filter tools,$(MAKECMDGOALS)),,--quiet)

calibrate: export HARNESS_MODEL := $(if $(filter command,$(firstword $(origin model))),$(value model),$(value MODEL))
calibrate: setup ## Measure MODEL and write its calibration below models/calibrations/
	@set -f; exec .venv/bin/harness calibrate $$COMMAND_ARGS

recalibrate: setup ## Measure again what is in models/calibrations/ (ARGS='--stale --dry-run': say what would be)
	@set -f; exec .venv/bin/harness recalibrate $$COMMAND_ARGS

test: tools ## Run the tests; what this machine lacks is skipped with the reason
	@set -f; exec $(PYTHON) -m pytest --durations=10 $$COMMAND_ARGS

test-gpu: ## Say what this machine's NVIDIA GPU does: gpu-report.tar.gz (ARGS="--engine-binary PATH"; 8 minutes)
	@set -f; exec sh scripts/gpu_report.sh $$COMMAND_ARGS

lint: tools ## Check style, formatting and spelling
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	.venv/bin/codespell

format: tools ## Format the code and apply the safe fixes
	$(PYTHON) -m ruff format .
	$(PYTHON) -m ruff check --fix .

type: tools ## Check the types (mypy, strict)
	$(PYTHON) -m mypy

test-engines: tools ## Calibrate with llama.cpp of the last year (20 minutes); writes docs/explanation/engines.md
	@set -f; exec $(PYTHON) -m bench.engines $$COMMAND_ARGS

bench: tools ## Measure the figures that the documentation quotes
	@set -f; exec $(PYTHON) scripts/bench.py $$COMMAND_ARGS

bench-faults: tools ## Kill harness a hundred times, count lost log lines, time the sampler (ARGS="--sandbox docker")
	@set -f; $(PYTHON) -m bench.sampler_cost && $(PYTHON) -m bench.log_burst $$COMMAND_ARGS && exec $(PYTHON) -m bench.kill9 $$COMMAND_ARGS

bench-fuzz: tools ## Read 100 000 damaged files of each format: no traceback, two seconds, two GiB (40 minutes)
	@set -f; $(PYTHON) -m bench.log_fuzz --count 100000 && exec $(PYTHON) -m bench.input_fuzz $$COMMAND_ARGS

bench-red-team: tools ## Act out attacks and accidents with real containers (needs Docker; two minutes)
	@set -f; exec $(PYTHON) -m bench.red_team

bench-mutants: tools ## Change each threshold and operator in a copy: which change does no fast test notice? (10 minutes)
	@set -f; exec $(PYTHON) -m bench.mutants $$COMMAND_ARGS

bench-drift: tools ## Calibrate five times over, and act out upgrades twenty times: what moves, and is it found? (5 minutes)
	@set -f; exec $(PYTHON) -m bench.drift $$COMMAND_ARGS

bench-accuracy: tools ## Compare predictions with real loads of six models (30 minutes); writes docs/explanation/accuracy.md
	@set -f; exec $(PYTHON) -m bench.accuracy $$COMMAND_ARGS

bench-header: tools ## Measure models from their headers and from their weights; writes docs/explanation/estimates.md (10 minutes)
	@set -f; exec $(PYTHON) -m bench.header $$COMMAND_ARGS

bench-devices: tools ## Compare verdicts over two and three devices with what llama-server does (ARGS="--engine DIR"; 30 minutes)
	@set -f; exec $(PYTHON) -m bench.devices $$COMMAND_ARGS

bench-verdicts: tools ## Compare verdicts with what llama-server then does (an hour); writes docs/explanation/verdicts.md
	@set -f; if [ -z "$$COMMAND_ARGS" ]; then $(PYTHON) -m bench.beyond || exit; fi; exec $(PYTHON) -m bench.verdicts $$COMMAND_ARGS

docs: tools ## Build the documentation into build/docs (needs requirements-ci.lock)
	@$(PYTHON) -c 'import material, mkdocs' 2>/dev/null || { echo 'make docs needs the pages'"'"' builder: .venv/bin/python -m pip install --require-hashes -r requirements-ci.lock' >&2; exit 2; }
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --quiet

release: tools ## Build sdist and wheel, try them in fresh environments, write SBOM and checksums (ARGS=--images)
	@set -f; exec $(PYTHON) scripts/release.py $$COMMAND_ARGS

stories: tools ## Act out what users come with: commands, seconds, answers (a minute; nothing is measured)
	@sh scripts/stories.sh

screenshots: tools ## Take the pictures of the documentation anew (needs Chromium and requirements-ci.lock)
	@$(PYTHON) scripts/screenshots.py

reference: tools ## Write the reference pages that follow from the code
	$(PYTHON) scripts/reference.py

LOCK := uv pip compile --quiet --universal --generate-hashes --python-version 3.11 --no-header --no-emit-index-url

lock: ## Resolve pyproject.toml anew into the lock files (needs uv)
	$(LOCK) --extra embedded --extra report --extra exporter --group build --upgrade pyproject.toml --output-file requirements.lock
	$(LOCK) --group dev --constraint requirements.lock --upgrade --output-file requirements-dev.lock
	$(LOCK) --extra fleet --extra hub --extra mcp --group ci --constraint requirements.lock --constraint requirements-dev.lock --upgrade pyproject.toml --output-file requirements-ci.lock

clean: ## Remove caches and build output
	rm -rf build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -path ./.venv -prune -o -type d -name __pycache__ -exec rm -rf {} +

distclean: clean ## The same, and .venv with the engine and the model in it
	rm -rf .venv .setup.lock .setup.log

schema: tools ## Write models/calibration.schema.json from the code
	$(PYTHON) -c "from harness.store.store import schema_text; print(schema_text(), end='')" > models/calibration.schema.json
