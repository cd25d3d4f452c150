# make compare   decode real questions with every method, side by side
# make test      the whole suite, CPU only
# make soak      the longer forms of the tests
# make peers     the same model through other stacks, as ratios (own environment)
# Everything else here serves these. PYTHON picks the interpreter (3.11 or newer).

PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
LOCK   := requirements/$(shell $(PYTHON) -c 'import sys; print("py311" if sys.version_info < (3, 12) else "py312")').txt
READY  := $(VENV)/.ready

# What the suite and the comparison read; each is verified by hash and kept in ~/.cache/headway.
COMPARE_DATA := smollm2-135m mt_bench
TEST_DATA    := $(COMPARE_DATA) enwik8 lambada piqa arc_easy hellaswag gsm8k

.PHONY: setup compare test soak lint peers data clean

setup: $(READY)

$(READY): $(LOCK) setup.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Headway needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r $(LOCK)
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

data: $(READY)
	$(PY) -m backbone.catalogue fetch $(TEST_DATA)

compare: $(READY)
	$(PY) -m backbone.catalogue fetch $(COMPARE_DATA)
	$(PY) -m harness.launch.compare --config=configs/compare.py --workdir=out/compare

test: $(READY) data
	JAX_PLATFORMS=cpu $(PY) -m pytest

soak: $(READY) data
	JAX_PLATFORMS=cpu $(PY) -m pytest -m slow

lint: $(READY)
	$(VENV)/bin/ruff check .

peers: $(READY)
	$(PYTHON) scripts/peers/setup.py .venv-peers
	$(PY) -m harness.peers --peers_python=.venv-peers/bin/python --workdir=out/peers

clean:
	rm -rf $(VENV) .venv-peers out
