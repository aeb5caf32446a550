# make demo: the main job on real data.   make test: every check that CI makes.   make docs: the site, into docs/_build/html.
PYTHON ?= python3
SHELL := bash
.SHELLFLAGS := -o pipefail -c
BIN := .venv/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt
# Of what pip says only what takes time.
TOLD := | awk '/^ *Downloading .*\(/ {print "   " $$0; fflush()} /^Installing collected/ {print "   installing"; fflush()}'
STAMP := .venv/.installed
FOR_DEMO := .venv/.installed_for_demo
# What is tested without kernels, too: what asks whether there are any. Tests of kernels choose them themselves, and so do most of
# those that are left out; tests/core/test_without_kernels.py runs those of functional and quant_tensor without kernels each time,
# and what integers a layer computes with hangs on values alone, which are the same bit for bit.
WITHOUT_KERNELS := $(addprefix tests/,core golden layers proxy quantizers test_staleness.py) \
	$(addprefix tests/quant_tensor/test_,claims.py later.py other_formats.py) \
	$(addprefix --ignore-glob=tests/,core/test_without_kernels.py layers/test_integer_execution*.py \
	layers/test_rnn_sequences.py quantizers/test_edge_values.py quantizers/test_predefined.py)

# Two processes; each goes through files in order, so that it makes what their tests share once, and then helps the other.
PYTEST := $(BIN)/python -m pytest -q -n 2 --dist worksteal

# What a docstring says of arguments, results and yields is there; these rules are in ruff's preview.
DOCSTRINGS := DOC102,DOC202,DOC403

# In short, for make test.
EXAMPLES := keyword_spotting quickstart ptq transformer mixed_precision quantize_a_model new_format formats custom_quantizer distributed
OPTIONS_keyword_spotting := --epochs 2
OPTIONS_quickstart := --epochs 2 --output .venv/demo_output
OPTIONS_new_format := --epochs 3
OPTIONS_formats := --output .venv/demo_output
example-distributed: RUN := torchrun --nproc-per-node 2

.PHONY: demo test docs lint format benchmark coverage clean

demo: $(FOR_DEMO)
	@echo "== training a small network at 8, 4 and 2 bits on handwritten digits (a minute)"
	@$(BIN)/python examples/quickstart.py

lint: $(STAMP)
	@echo "== ruff: lint, docstrings and format"
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff check --quiet --preview --select $(DOCSTRINGS) .
	@$(BIN)/ruff format --quiet --check .
	@echo "== codespell"
	@$(BIN)/codespell
	@echo "== mypy --strict"
	@$(BIN)/mypy
	@echo "== import-linter: every import goes down the floors"
	@$(BIN)/lint-imports --no-cache > .venv/imports.log || (cat .venv/imports.log; exit 1)

docs: $(STAMP)
	@echo "== documentation: notebooks run, warnings are errors; docs/_build/html/index.html"
	@$(BIN)/python -m sphinx --builder html --fail-on-warning --keep-going --quiet docs docs/_build/html 2>&1 \
		| awk '!/IPKernelApp|traitlets client/ && NF'

# Its output is shown where it fails.
example-%: $(STAMP)
	@log=.venv/example_$*.log; OMP_NUM_THREADS=1 $(BIN)/$(or $(RUN),python) examples/$*.py $(OPTIONS_$*) > $$log 2>&1 \
		|| (echo "examples/$*.py fails:"; cat $$log; exit 1)

# Documentation, linters and examples, two at a time; each of them takes one processor.
test: $(STAMP)
	@echo "== documentation, linters, and examples in short"
	@$(MAKE) --no-print-directory --jobs 2 docs lint $(addprefix example-,$(EXAMPLES))
	@echo "== pytest"
	@$(PYTEST) -m "not exhaustive"
	@echo "== pytest of what has kernels, without them"
	@QFRAMEWORK_KERNELS=reference $(PYTEST) -m "not slow and not exhaustive" $(WITHOUT_KERNELS)

coverage: $(STAMP)
	@echo "== pytest, with the lines that it reaches; the floor is in pyproject.toml"
	@$(PYTEST) -m "not exhaustive" --cov --cov-report=term:skip-covered

benchmark: $(STAMP)
	@$(BIN)/python -m benchmarks --check

format: $(STAMP)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

$(FOR_DEMO): pyproject.toml constraints.txt
	@echo "== setting up .venv, once: the environment"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "== torch, which is the largest part (some hundred MB)"
	@$(INSTALL) torch $(TOLD)
	@echo "== this library, and what the examples need"
	@$(INSTALL) --editable ".[examples,export]" qonnx $(TOLD)
	@touch $(FOR_DEMO)

$(STAMP): $(FOR_DEMO)
	@echo "== what tests, linters and the documentation need"
	@$(INSTALL) --editable ".[dev]" $(TOLD)
	@touch $(STAMP)

clean:
	rm -rf .venv demo_output docs/_build build dist *.egg-info
