# make run, make test, make lab: each sets up .venv the first time and only then.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.installed

.PHONY: run test lab docs bench export clean

run: $(READY)       ## train a chapter, check its paper's claim, show what came out
	@$(BIN)/tfbench run in_context/gradient_descent

test: $(READY)      ## everything: export, contract, library, chapters, command line
	@OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n auto --dist worksteal

lab: $(READY)       ## JupyterLab at the front page
	@$(BIN)/tfbench lab

docs: $(READY)    ## the static site, in _docs/html
	@$(BIN)/python docs/build.py

bench: $(READY)     ## what is measured and never asserted
	@$(BIN)/python tests/benchmarks

export: $(READY)    ## write tfbench/ and README.md from the notebooks
	@$(BIN)/nbdev_export && $(BIN)/tfbench readme

clean:
	rm -rf $(VENV) *.egg-info

$(READY): pyproject.toml constraints.txt requirements-data.txt requirements-peers.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "tfbench needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1 | tail -1). Name another one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@echo "setting up $(VENV), once; this takes a few minutes"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[real,data,text,lab,sweep,docs,mcmc,zoo,peers,dev]'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-data.txt -r requirements-peers.txt
	@touch $@
