.PHONY: help run test test-long test-engines test-vulkan build perf perf-model scorecard venv model check

help: ## What can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

run: ## Fetch a real model, build, and serve it on both APIs
	@scripts/run.sh $(ARGS)

test: ## Install what the tests need, and run all of them
	@scripts/test.sh $(ARGS)

test-long: ## End processes two hundred times in each way, and run each fuzz target for five minutes
	@scripts/test_long.sh $(ARGS)

test-engines: ## Put real vLLM servers behind the gateway, and kill one of two
	@scripts/test_engines.sh $(ARGS)

test-vulkan: ## Run a real model on Mesa's software GPU, through Vulkan
	@scripts/test_vulkan.sh $(ARGS)

build: ## Build the server and the performance test
	@bash -c 'set -euo pipefail; source scripts/llama.sh; cargo build --release "$${FEATURES[@]}"'

perf: ## Measure the cost that each API adds to a token: target/overhead.html
	@scripts/perf.sh $(ARGS)

perf-model: ## Compare Tokenway with llama.cpp's own server on a real model: target/model.html
	@scripts/model_perf.sh $(ARGS)

scorecard: ## Play the faults of an engine on Tokenway and other gateways, and grade each
	@scripts/scorecard.sh $(ARGS)

venv: ## The Python of the examples and of the tests with third-party clients
	@scripts/venv.sh

model: ## Fetch the real model into the user's cache
	@scripts/model.sh

check: ## All that CI checks
	@.ci/run
