#!/usr/bin/env bash
# What this node is and runs, for a job's logs. Values of variables that look like secrets are not shown.
repository=$(cd "$(dirname "$0")/.." && pwd)
line() { printf '%-12s %s\n' "$1" "$2"; }

line date "$(date -u '+%F %T UTC')"
line node "${SLURMD_NODENAME:-$(hostname -s)} ($(hostname))"
line kernel "$(uname -srm)"
line cores "$(env -u OMP_NUM_THREADS nproc) of $(getconf _NPROCESSORS_ONLN)"
line memory "$(awk '/^MemTotal/ {printf "%.0f GB", $2 / 1e6}' /proc/meminfo 2>/dev/null)"
line limits "open files $(ulimit -n), locked memory $(ulimit -l)"
if command -v nvidia-smi >/dev/null; then
    timeout 20 nvidia-smi --query-gpu=index,name,memory.total,driver_version,ecc.errors.uncorrected.volatile.total --format=csv,noheader 2>&1 |
        while read -r gpu; do line gpu "$gpu"; done
else
    line gpu "none: no nvidia-smi"
fi
if command -v ip >/dev/null; then ip -br -4 addr | while read -r interface; do line interface "$interface"; done; fi
line repository "$repository"
line revision "$(git -C "$repository" -c safe.directory='*' describe --always --dirty --abbrev=40 2>/dev/null || echo unknown)"
python - <<'EOF'
import importlib.metadata as metadata
import sys

print(f"{'python':<12} {sys.version.split()[0]} {sys.executable}")
names = sorted(str(d.metadata["Name"]) for d in metadata.distributions() if str(d.metadata["Name"]).startswith("nvidia-nccl"))
for name in ("torch", *dict.fromkeys(names), "megatron-core", "deepspeed", "triton", "apex", "transformer-engine"):
    try:
        print(f"{name:<12} {metadata.version(name)}")
    except metadata.PackageNotFoundError:
        print(f"{name:<12} not installed")
EOF
env -0 | LC_ALL=C sort -z | while IFS='=' read -r -d '' name value; do
    case $name in
    *TOKEN* | *KEY* | *SECRET* | *PASS* | *JWT* | *CREDENTIAL* | *AUTH*) value='(not shown)' ;;
    esac
    case $name in
    NCCL_* | GLOO_* | SLURM_* | SFFN_* | CUDA_* | TORCH_* | OMP_* | MASTER_* | FI_* | UCX_*) printf '%s=%s\n' "$name" "$value" ;;
    esac
done
