#!/usr/bin/env bash
# One task of a job's step (pretrain.sbatch): under srun a rank, else a node's launcher, which starts this script again for each rank.
#
#   start.sh srun|torchrun|deepspeed|rank RANKS-A-NODE LOG-FOLDER ARGUMENTS-OF-PRETRAIN...
set -u
launcher=$1 ranks=$2 logs=$3
shift 3
slurm=$(cd "$(dirname "$0")" && pwd)
node=${SLURMD_NODENAME:-$(hostname -s)}
mkdir -p "$logs" # this node may have it as a folder of its own

if [ "$launcher" != rank ] && [ "${SLURM_LOCALID:-0}" = 0 ]; then
    timeout 60 bash "$slurm/environment.sh" >"$logs/environment.$node.txt" 2>&1 &
fi
# The signal that has the ranks save reaches every process of the step, and would end a launcher; what is ignored here stays ignored
# in what is started from here. The ranks themselves handle it.
[ "$launcher" = srun ] || trap '' USR1

# Compiled kernels lie on the node: ranks would wait for each other's files on a shared home
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-${SLURM_TMPDIR:-${TMPDIR:-/tmp}}/triton-$(id -u)}

case $launcher in
srun | rank)
    exec python "${slurm%/*}/sffn_dist/pretrain.py" "$@" >>"$logs/rank_${RANK:-$SLURM_PROCID}.$node.log" 2>&1
    ;;
torchrun)
    exec python -m torch.distributed.run --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="$ranks" --node-rank="$SLURM_NODEID" \
        --rdzv-backend=static --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" --max-restarts=0 \
        --no-python bash "$0" rank "$ranks" "$logs" "$@"
    ;;
deepspeed)
    # shellcheck disable=SC2086  # a word a host
    world=$(python -m sffn_dist.cluster world-info "$SLURM_NODEID" "$ranks" $SFFN_HOSTS) || exit 1
    exec python -m deepspeed.launcher.launch --world_info="$world" --node_rank="$SLURM_NODEID" --master_addr="$MASTER_ADDR" \
        --master_port="$MASTER_PORT" --no_python --no_local_rank bash "$0" rank "$ranks" "$logs" "$@"
    ;;
esac
