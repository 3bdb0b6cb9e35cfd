# make demo   train the demo (installs first if needed)      make test   all tests
# make lint   ruff and mypy                                  make install   .venv with everything in it
# make docs          docs/ as a site with an API reference, into build/site
# make test-slurm    jobs on a real Slurm on this machine, for some minutes; needs root and Debian's packages slurmctld slurmd slurm-client munge
# make test-faults   runs and saves killed at random moments, disks that fill, ranks that hang or lie, for a quarter of an hour;
#                    their table goes to TABLE
# make test-sweeps   the plan's memory against the live bytes of many models, what a step asks of a CUDA device, the kernels
#                    that `make test` does not compile ahead of time, and the longer example, for a quarter of an hour
# make test-versions exported folders under transformers 4.48, the newest 4 and 5; kernels under triton 3.7.1 and 3.9.0; pip brings those, once,
#                    below build/
# make test-mutants  small faults put into the code one at a time, which tests must see; half an hour
# make gpu           on a GPU: tests, training, layers, in pieces of eight minutes (tools/gpu.py); make gpu-wheels: what to carry to one without a network
PYTHON ?= python3
VENV ?= .venv
# where torch comes from, if not from pip's default: TORCH_OPTIONS="--index-url ..."
TORCH_OPTIONS ?=
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TABLE ?= benchmarks/results/faults_cpu.csv
export PYTHONSAFEPATH := 1

# folder of wheels for a machine without a network, and the Python there
WHEELS ?=
WHEELS_PYTHON ?= 3.12

.PHONY: install demo test test-faults test-slurm test-versions test-sweeps test-mutants gpu gpu-wheels docs lint clean

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
	$(BIN)/python -m pytest -s -m versions tests/checkpoint_room/test_hf_versions.py tests/kernel_room/test_triton_versions.py

test-sweeps: $(READY)
	$(BIN)/python -m pytest -m sweeps tests/training_room/test_live_bytes.py tests/gpu_room/test_fake_cuda.py tests/kernel_room/test_ahead_of_time.py tests/tools_room/test_examples.py

test-mutants: $(READY)
	$(BIN)/python tests/mutants/run.py $(ARGUMENTS)

# on the machine's own Python where WHEELS are carried to it, else in the environment
gpu: $(if $(WHEELS),,$(READY))
	$(if $(WHEELS),$(PYTHON) -m pip install --quiet --no-index --no-deps $(WHEELS)/*.whl)
	PYTHONPATH="$(CURDIR):$(CURDIR)/kernels:$(CURDIR)/benchmarks" $(if $(WHEELS),$(PYTHON),$(BIN)/python) tools/gpu.py $(ARGUMENTS)

gpu-wheels: $(READY)
	mkdir -p build/wheels
	DS_BUILD_OPS=0 $(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation -w build/wheels $$(grep '^deepspeed==' constraints.txt) hjson
	$(BIN)/python -m pip download --quiet --no-deps --only-binary=:all: --python-version $(WHEELS_PYTHON) --platform manylinux2014_x86_64 \
	    --platform manylinux_2_28_x86_64 -c constraints.txt -d build/wheels megatron-core pydantic annotated-types typing-inspection
	$(BIN)/python -m pip download --quiet --no-deps --only-binary=:all: --python-version $(WHEELS_PYTHON) --platform manylinux2014_x86_64 \
	    -d build/wheels pydantic-core==$$($(BIN)/python -c 'from importlib.metadata import version; print(version("pydantic-core"))')

# what it needs is installed at its first call
docs: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	$(BIN)/python tools/config_reference.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
