# The project on NVIDIA GPUs: docker build -f docker/cuda.Dockerfile -t sffn_dist:cuda .
# docker run --rm --gpus all --ipc=host -v "$PWD/runs:/opt/sffn_dist/runs" sffn_dist:cuda \
#     deepspeed sffn_dist/pretrain.py --config configs/wide_blockdiag.json
# torch's wheel brings CUDA's libraries and Triton; the host brings the driver (for CUDA 13: 580 or newer).
FROM python:3.12-slim-bookworm

# a compiler for Triton's launchers; ssh, pdsh: DeepSpeed's launcher over several nodes
# hadolint ignore=DL3008  # Debian keeps one version of each in a release
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ git make openssh-client pdsh \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/sffn_dist
ENV PATH=/opt/sffn_dist/.venv/bin:$PATH PYTHONSAFEPATH=1 PIP_NO_CACHE_DIR=1 DS_BUILD_OPS=0 \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility

# requirements first: they change less often than the sources
COPY pyproject.toml constraints.txt README.md LICENSE Makefile ./
RUN python -m venv .venv \
    && .venv/bin/python -m pip install "$(grep '^torch==' constraints.txt)" \
    && mkdir -p sffn_dist kernels/sffn_kernels benchmarks/sffn_bench \
    && touch sffn_dist/__init__.py kernels/sffn_kernels/__init__.py benchmarks/sffn_bench/__init__.py \
    && .venv/bin/python -m pip install -c constraints.txt -e '.[track,hf,plot]'
COPY . .
RUN .venv/bin/python -m pip install --no-deps -c constraints.txt -e . && touch .venv/.ready

CMD ["python", "sffn_dist/pretrain.py", "--config", "configs/wide_blockdiag.json", "--plan"]
