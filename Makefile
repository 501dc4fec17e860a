# make setup | demo | test | test-all | test-lowest | test-flower | docs | bench | bench-peers | lint | clean. The environment is .venv/, made on first use.
PYTHON ?= python3
RECIPE ?= digits
SEED ?= 0
BIN := .venv/bin
STAMP := .venv/.installed

LOWEST := .venv-lowest

.PHONY: setup demo test test-all test-lowest test-flower docs bench bench-more bench-peers lint clean

setup: $(STAMP)

$(STAMP): pyproject.toml requirements.lock
	@echo "Installing into .venv; this takes some minutes."
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.lock -e '.[dev]'
	@touch $@

# The whole job on real data in about two minutes, into a folder that does not exist yet. Tensors this
# small are fastest on one thread.
demo: $(STAMP)
	@out=runs/$(RECIPE)-$(SEED); n=1; \
	while [ -e "$$out" ]; do n=$$((n + 1)); out=runs/$(RECIPE)-$(SEED)-run$$n; done; \
	OMP_NUM_THREADS=1 $(BIN)/fedl2p run $(RECIPE) --seed $(SEED) --out "$$out"

# Without the tests marked slow. One thread per worker: two workers that each take every core only
# get in each other's way.
test: $(STAMP)
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not slow"

test-all: $(STAMP)
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --durations=20

# On the lowest versions that pyproject.toml allows; the tests of federations take long and are left
# out.
test-lowest: $(LOWEST)/.installed
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -q -n 2 --dist loadfile -m "not slow" \
		--ignore tests/federation --ignore tests/deploy

$(LOWEST)/.installed: pyproject.toml requirements-lowest.lock
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet -c requirements-lowest.lock -e '.[dev]'
	@touch $@

# The federation's tests on the oldest and the newest Flower that pyproject.toml allows. Each has an
# environment of its own, which finds everything else in .venv; that one is not changed.
FLOWERS := 1.40.0 1.42.0
FLOWER_TESTS := tests/flower tests/federation tests/deploy

test-flower: $(STAMP)
	set -e; for version in $(FLOWERS); do \
	  env=.venv-flower/$$version; \
	  [ -e $$env/.installed ] || { \
	    $(BIN)/python -m venv $$env; \
	    $(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	      > $$($$env/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/shared.pth; \
	    $$env/bin/python -m pip install --quiet "flwr==$$version"; \
	    touch $$env/.installed; }; \
	  PYTHONPATH=src OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 \
	    $$env/bin/python -m pytest -q $(FLOWER_TESTS); \
	done

# The site, into site/; a broken link or a name that is not found is an error. It needs no network.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# What costs what, in one table from one run; about half an hour.
bench: $(STAMP)
	$(BIN)/python benchmarks/speed.py

# The other measurements of cost; the studies of accuracy take hours and are run by name.
bench-more: $(STAMP)
	$(BIN)/python benchmarks/cohorts.py
	$(BIN)/python benchmarks/strategies.py cost
	$(BIN)/python benchmarks/engines.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/scale.py --learn 1 --repeats 3

# Other libraries, which it installs into .venv-peers; about ten minutes after that.
bench-peers: $(STAMP)
	$(BIN)/python benchmarks/peers.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf .venv .venv-lowest .venv-flower .venv-peers build dist site .pytest_cache .ruff_cache .mypy_cache .hypothesis src/*.egg-info
	find src tests benchmarks examples -name __pycache__ -prune -exec rm -rf {} +
