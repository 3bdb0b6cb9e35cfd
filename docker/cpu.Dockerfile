# The project on CPUs: docker build -f docker/cpu.Dockerfile -t sffn_dist:cpu .
# docker run --rm sffn_dist:cpu runs the demo's plan; with a command it runs that.
FROM python:3.12-slim-bookworm

# a compiler: torch.compile and DeepSpeed build parts at run time
# hadolint ignore=DL3008  # Debian keeps one version of each in a release
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ git make \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/sffn_dist
ENV PATH=/opt/sffn_dist/.venv/bin:$PATH PYTHONSAFEPATH=1 PIP_NO_CACHE_DIR=1 DS_BUILD_OPS=0

# requirements first: they change less often than the sources
COPY pyproject.toml constraints.txt README.md LICENSE Makefile ./
RUN python -m venv .venv \
    && .venv/bin/python -m pip install --index-url https://download.pytorch.org/whl/cpu "$(grep '^torch==' constraints.txt)" \
    && mkdir -p sffn_dist kernels/sffn_kernels benchmarks/sffn_bench \
    && touch sffn_dist/__init__.py kernels/sffn_kernels/__init__.py benchmarks/sffn_bench/__init__.py \
    && .venv/bin/python -m pip install -c constraints.txt -e '.[track,hf,plot]'
COPY . .
RUN .venv/bin/python -m pip install --no-deps -c constraints.txt -e . && touch .venv/.ready

CMD ["python", "sffn_dist/pretrain.py", "--config", "configs/demo.json", "--plan"]
