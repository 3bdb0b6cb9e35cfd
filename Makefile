# make demo   train the demo (installs first if needed)      make test   all tests
# make lint   ruff and mypy                                  make install   .venv with everything in it
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export PYTHONSAFEPATH := 1

.PHONY: install demo test lint clean

install: $(READY)

# torch first, at the version that the constraints pin: a bare requirement would take whichever build is newest
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $$(grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[track,hf,dev]'
	touch $@

demo: $(READY)
	PATH="$(abspath $(BIN)):$$PATH" deepspeed --num_gpus 2 sffn_dist/pretrain.py --config configs/demo.json run.dir=runs/demo

test: $(READY)
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
