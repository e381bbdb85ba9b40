# Everything runs in .venv, which is made anew where pyproject.toml or constraints.txt changed.
PROCESSES ?= 3
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
STAMP := $(VENV)/.installed
PEERS := $(VENV)/.peers-installed
BIN := $(VENV)/bin

.PHONY: test lint demo bench clean

# Processes of one thread each: with threads of their own they would wait for each other. Three of them on two cores,
# as tests of clusters wait a lot; files in their order, so that the longest of those are not left to the end.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(PROCESSES) --dist loadfile --no-loadscope-reorder

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

demo: $(STAMP)
	$(BIN)/ntkpipe run workflows/mnist5k/pntk.yaml

# Scripts only: what they share is in folders.
bench: $(PEERS)
	set -e; for script in benchmarks/*.py; do $(BIN)/python "$$script"; done

clean:
	rm -rf $(VENV) *.egg-info build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[compute,dask,xarray,scikit-learn,cluster,objects,report,examples,dev]'
	# For its schemas alone, and so out of sight of Python: it depends on three Kubernetes clients.
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps --upgrade \
		--target $(VENV)/share/dask-kubernetes dask-kubernetes
	touch $(STAMP)

# The extra `bench`, without what it depends on: torch and numpy are there, and torchvision is not used. Behind detkit's
# name is what it imports that is not there.
$(PEERS): $(STAMP)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps asdfghjkl nngeometry torchjd \
		detkit ml_dtypes pooch tensorstore texplot
	touch $(PEERS)
