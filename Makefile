# Each target makes what it needs: `make demo` and `make test` run on a machine that has only Python >= 3.11 and make.
PYTHON ?= python3
VENV   ?= .venv
PIP     = $(VENV)/bin/python -m pip --disable-pip-version-check
SOURCES = dynprobe tests benchmarks examples .ci docs/_build docs/concepts docs/tutorials

.PHONY: demo test test-slow test-long test-matrix audit check docs hooks format package release bench bench-ratios clean

demo: .venv-demo/.installed  ## a real model, clean and perturbed, from nothing (fetches torch, transformers and 93 MB of weights)
	.venv-demo/bin/dynprobe run --model smollm2-135m --perturb alpha=0.1
	.venv-demo/bin/dynprobe show "$$(ls -td runs/*smollm2* | head -n 1)" --figure demo.png

.venv-demo/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-demo
	.venv-demo/bin/python -m pip --disable-pip-version-check install -q -c constraints.txt torch
	.venv-demo/bin/python -m pip --disable-pip-version-check install -q -c constraints.txt '.[demo]'
	touch $@

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt torch
	$(PIP) install -q -c constraints.txt -e '.[dev]'
	touch $@

test: $(VENV)/.installed  ## all tests that need no download
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q -n 2 -m "not slow and not long"

test-slow: $(VENV)/.installed  ## end-to-end tests on real weights
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q -n 2 --dist loadfile -m "slow and not long"

test-long: $(VENV)/.installed  ## the exhaustive versions: every architecture, every input
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q -m long

test-matrix:  ## the core tests with the oldest dependencies allowed, and with the newest that can be installed
	PYTHON=$(PYTHON) .ci/matrix oldest
	PYTHON=$(PYTHON) .ci/matrix newest

audit: $(VENV)/.installed  ## licences of all dependencies, and known vulnerabilities (asks PyPI)
	$(VENV)/bin/python .ci/licences.py --check
	$(PIP) install -q pip-audit
	$(VENV)/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip

check: $(VENV)/.installed  ## format, lint, types, import rules
	$(VENV)/bin/ruff format --check $(SOURCES)
	$(VENV)/bin/ruff check $(SOURCES)
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

docs: $(VENV)/.docs  ## the site into site/, strictly: every tutorial runs, every warning is an error
	OMP_NUM_THREADS=1 NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true $(VENV)/bin/python -m mkdocs build --strict
	$(VENV)/bin/python docs/_build/offline.py site
	$(VENV)/bin/python -m pytest -q tests/docs/test_site_sources.py

$(VENV)/.docs: $(VENV)/.installed
	$(PIP) install -q -c constraints.txt -e '.[docs]'
	touch $@

hooks: $(VENV)/.installed  ## have git run the steps of check before each commit
	$(VENV)/bin/pre-commit install

package: $(VENV)/.installed  ## wheel and sdist: built, looked into, installed in clean environments, run there
	$(VENV)/bin/python .ci/package.py

release: $(VENV)/.installed  ## everything but the upload; DRY=--dry-run changes no file
	$(VENV)/bin/python .ci/release.py $(DRY)

format: $(VENV)/.installed
	$(VENV)/bin/ruff format $(SOURCES)
	$(VENV)/bin/ruff check --fix $(SOURCES)

bench: $(VENV)/.installed  ## the budgets, on this machine (needs the real weights; an idle machine)
	$(VENV)/bin/python -m pip install -q -c constraints.txt '.[peers]'
	$(VENV)/bin/python benchmarks/capture.py
	$(VENV)/bin/python benchmarks/generation.py
	$(VENV)/bin/python benchmarks/memory.py
	$(VENV)/bin/python benchmarks/sweep.py
	$(VENV)/bin/python benchmarks/startup.py
	$(VENV)/bin/python benchmarks/bare_command.py
	$(VENV)/bin/python benchmarks/cem_attention.py

BENCH_MODEL ?= tiny-llama

bench-ratios: $(VENV)/.installed  ## ratios against benchmarks/budgets.json: a warning up to twice a budget, a failure beyond
	$(VENV)/bin/dynprobe bench --model $(BENCH_MODEL) --peers none --json --quiet --out $(VENV)/bench.json > $(VENV)/bench.log
	$(VENV)/bin/python benchmarks/ratios.py $(VENV)/bench.json

clean:
	rm -rf $(VENV) .venv-demo .venv-oldest .venv-newest build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
