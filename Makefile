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
# What is tested without kernels, too; the tests of kernels themselves choose them, and so do those that are ignored.
WITHOUT_KERNELS := tests/test_staleness.py $(addprefix tests/,core functional golden layers proxy quant_tensor quantizers) \
	$(addprefix --ignore=tests/,core/test_without_kernels.py quantizers/test_edge_values.py)

# What a docstring says of arguments, results and yields is there; these rules are in ruff's preview.
DOCSTRINGS := DOC102,DOC202,DOC403

# In short, for make test.
EXAMPLES := "quickstart.py --epochs 2 --output .venv/demo_output" ptq.py "keyword_spotting.py --epochs 2" transformer.py \
	mixed_precision.py quantize_a_model.py "new_format.py --epochs 3" "formats.py --output .venv/demo_output" custom_quantizer.py

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

test: lint docs
	@echo "== examples, in short"
	@printf '%s\n' $(EXAMPLES) | OMP_NUM_THREADS=1 xargs -P 2 -I {} bash -c \
		'log=$$(mktemp); $(BIN)/python examples/{} > $$log 2>&1 || (cat $$log; exit 255)'
	@$(BIN)/torchrun --nproc-per-node 2 examples/distributed.py > .venv/distributed.log 2>&1 || (cat .venv/distributed.log; exit 1)
	@echo "== pytest"
	@$(BIN)/python -m pytest -q -n 2 -m "not exhaustive"
	@echo "== pytest of what has kernels, without them"
	@QFRAMEWORK_KERNELS=reference $(BIN)/python -m pytest -q -n 2 -m "not slow and not exhaustive" $(WITHOUT_KERNELS)

coverage: $(STAMP)
	@echo "== pytest, with the lines that it reaches; the floor is in pyproject.toml"
	@$(BIN)/python -m pytest -q -n 2 -m "not exhaustive" --cov --cov-report=term:skip-covered

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
