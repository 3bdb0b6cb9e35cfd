# make demo   train the demo (installs first if needed)      make test   all tests
# make lint   ruff and mypy                                  make install   .venv with everything in it
# make test-slurm    jobs on a real Slurm on this machine, for some minutes; needs root and Debian's packages slurmctld slurmd slurm-client munge
# make test-faults   runs and saves killed at random moments, disks that fill, ranks that hang or lie, for a quarter of an hour;
#                    their table goes to TABLE
# make test-sweeps   the plan's memory against the live bytes of many models, for a quarter of an hour
# make test-versions exported folders under transformers 4.48, the newest 4 and 5; pip brings those, once, below build/
PYTHON ?= python3
VENV ?= .venv
# where torch comes from, if not from pip's default: TORCH_OPTIONS="--index-url ..."
TORCH_OPTIONS ?=
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TABLE ?= benchmarks/results/faults_cpu.csv
export PYTHONSAFEPATH := 1

.PHONY: install demo test test-faults test-slurm test-versions test-sweeps lint clean

install: $(READY)

# torch first, at the version that the constraints pin: a bare requirement would take whichever build is newest
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 14) else f"Python {v[0]}.{v[1]}: must be 3.11 to 3.13; name one with PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check $(TORCH_OPTIONS) $$(grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[track,hf,plot,eval,dev]'
	touch $@

demo: $(READY)
	PATH="$(abspath $(BIN)):$$PATH" deepspeed --num_gpus 2 sffn_dist/pretrain.py --config configs/demo.json run.dir=runs/demo

# two workers, each with whole files: many tests compute on one core
test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-faults: $(READY)
	FAULT_TABLE=$(abspath $(TABLE)) $(BIN)/python -m pytest -m faults

test-slurm: $(READY)
	$(BIN)/python -m pytest -m slurm tests/slurm_room

test-versions: $(READY)
	$(BIN)/python -m pytest -s -m versions tests/checkpoint_room/test_hf_versions.py

test-sweeps: $(READY)
	$(BIN)/python -m pytest -m sweeps tests/training_room/test_live_bytes.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
