# Two commands set everything up on a machine with Python 3.11+ and make: `make demo` and `make test`.
PYTHON ?= python3
CORES ?= $(shell nproc)
VENV := .venv
PEERS := .venv-peers
BIN := $(VENV)/bin
SNAKEMAKE := $(BIN)/snakemake --workflow-profile workflow/profiles/default --cores $(CORES)
PYTEST := $(BIN)/python -m pytest --numprocesses $(CORES) --dist loadfile

.PHONY: demo test test-all faults peers drivers lint benchmarks clean
.DELETE_ON_ERROR:

demo: $(VENV)/installed
	$(SNAKEMAKE) --set-threads dictionary=1 activation_part=1 compare=1
	@echo
	@echo "The report: $(CURDIR)/results/reports/demo/index.html"

test: $(VENV)/installed lint
	$(PYTEST) -m "not slow"

test-all: $(VENV)/installed lint peers drivers
	$(PYTEST)

# The tables of docs/faults.md: what each fault does, then kills at random moments (an hour on two cores).
faults: $(VENV)/installed
	$(PYTEST) tests/faults tests/slurm tests/workflow/test_resume.py
	$(BIN)/python -m tests.faults.random_kills --kills 60
	$(BIN)/python -m tests.faults.random_kills_slurm --kills 45

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/snakefmt --check Snakefile workflow
	$(BIN)/mypy
	$(BIN)/snakemake --lint

benchmarks: $(VENV)/installed peers
	$(BIN)/python -m tests.benchmarks.workflow_scale
	$(BIN)/python -m tests.benchmarks.waiting
	$(BIN)/python -m tests.benchmarks.ppo_speed
	$(BIN)/python -m tests.benchmarks.extraction
	$(BIN)/python -m tests.benchmarks.supply
	$(BIN)/python -m tests.benchmarks.dump_memory
	$(BIN)/python -m tests.benchmarks.divergence
	$(BIN)/python -m tests.benchmarks.sae_speed
	$(BIN)/python -m tests.benchmarks.sae_quality
	$(BIN)/python -m tests.benchmarks.write_change
	$(BIN)/python -m tests.benchmarks.report

# Other libraries for the tests of interoperability and the benchmarks, which cannot share an environment with rlsae.
peers: $(PEERS)/installed

$(PEERS)/installed: tests/interop/peers.lock
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/pip install --quiet $$(grep '^torch==' $<)
	$(PEERS)/bin/pip install --quiet --no-deps --requirement $<
	touch $@

# What executes docs/tutorial.ipynb and drives a browser; it only adds packages to the environment.
drivers: $(VENV)/drivers

$(VENV)/drivers: tests/workflow/drivers.lock $(VENV)/installed
	$(BIN)/pip install --quiet --no-deps --requirement $<
	touch $@

# torch first and alone: the CPU build, which the rest must not replace.
$(VENV)/installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $$(grep '^torch==' requirements.lock)
	$(BIN)/pip install --quiet --requirement requirements.lock
	$(BIN)/pip install --quiet --no-deps --editable .
	touch $@

clean:
	rm -rf results logs benchmarks .snakemake
