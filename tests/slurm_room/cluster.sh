#!/usr/bin/env bash
# A real Slurm of two nodes on one machine, for tests; gone without a trace afterwards.
#
#   cluster.sh lacks            why it cannot be had here, on standard output; nothing where it can
#   cluster.sh up DIR           start it; DIR: absolute and short (unix sockets lie in it), made by this script
#   cluster.sh kill DIR NODE    kill a node's daemons (its jobs' processes live on, as when a daemon dies)
#   cluster.sh start DIR NODE   start them again
#   cluster.sh down DIR         end jobs and daemons, undo the network, remove DIR
#
# Each node is a slurmd in network, UTS and mount namespaces of its own: own host name (n1, n2), own address, own loopback. So
# a job that takes localhost for its master hangs here as on a cluster. Nothing of the machine's own is changed but one bridge added.
# Partitions: main; low and high, of which high preempts low. The environment of SLURM_CONF=DIR/slurm.conf is all that clients need.
set -euo pipefail
umask 022
export LC_ALL=C PATH="$PATH:/usr/sbin:/sbin"
for name in ${!SLURM_@}; do unset "$name"; done # nothing of an outer Slurm may leak in

NODES=(n1 n2)
D=${2:-}
export SLURM_CONF=$D/slurm.conf

die() { echo "cluster.sh: $*" >&2; exit 1; }

lacks() {
    local tool
    for tool in munged slurmctld slurmd sbatch ip unshare nsenter; do
        command -v "$tool" >/dev/null || { echo "$tool is not installed (apt-get install slurmctld slurmd slurm-client munge iproute2)"; return; }
    done
    if [ "$(id -u)" != 0 ]; then echo "needs root, for network namespaces"; return; fi
    if ! unshare -n -m -u true 2>/dev/null; then echo "namespaces are not allowed here"; return; fi
    if ! ip link add sffnprobe type bridge 2>/dev/null; then echo "network bridges are not allowed here"; return; fi
    ip link del sffnprobe
}

# ---- processes are (pid, start time) pairs, so that a recycled pid is never signalled ----

start_time() {
    local line
    line=$(cat "/proc/$1/stat" 2>/dev/null) || return 1
    line=${line##*) }
    # shellcheck disable=SC2086  # words are wanted
    set -- $line
    [ "$1" != Z ] && echo "${20}"
}
alive() { [ "$(start_time "$1" || true)" = "$2" ]; }
stop() { # PID START SIGNAL: and wait for its end, 10 s
    local _
    if ! alive "$1" "$2"; then return 0; fi
    kill "-$3" "$1" 2>/dev/null || true
    for _ in $(seq 200); do alive "$1" "$2" || return 0; sleep 0.05; done
    kill -KILL "$1" 2>/dev/null || true
}
record() { # NAME PIDFILE: wait for the pid of a daemon that was just started, and write it down
    local pid started _
    for _ in $(seq 200); do
        pid=$(cat "$2" 2>/dev/null || true)
        if [ -n "$pid" ] && started=$(start_time "$pid"); then
            echo "$pid $started" >"$D/run/$1.daemon"
            return 0
        fi
        sleep 0.05
    done
    die "$1 did not start: $(tail -n 5 "$D"/log/* 2>&1)"
}
daemon() { # NAME SIGNAL
    local pid started
    [ -s "$D/run/$1.daemon" ] || return 0
    read -r pid started <"$D/run/$1.daemon"
    rm "$D/run/$1.daemon"
    stop "$pid" "$started" "$2"
}
# Of this cluster's jobs: a slurmstepd outlives its slurmd, and is known by its log in DIR; a task by the environment it started with.
strays() {
    local entry pid
    for entry in $(grep -lzxF -- "SLURM_CONF=$SLURM_CONF" /proc/[0-9]*/environ 2>/dev/null || true); do
        pid=${entry#/proc/} pid=${pid%/environ}
        if grep -qz '^SLURM_JOB_ID=' "$entry" 2>/dev/null; then echo "$pid $(start_time "$pid" || echo 0)"; fi
    done
    for entry in $(find /proc/[0-9]*/exe -maxdepth 0 -lname '*/slurmstepd*' 2>/dev/null || true); do
        pid=${entry#/proc/} pid=${pid%/exe}
        if [ -n "$(find "/proc/$pid/fd" -lname "$D/log/slurmd.*" -print -quit 2>/dev/null)" ]; then
            echo "$pid $(start_time "$pid" || echo 0)"
        fi
    done
}

# ---- network and configuration ----

network() { # a bridge, whose making is the lock on its subnet
    local i node
    for i in $(seq 10 99); do
        if ip link add "sffn$i" type bridge 2>/dev/null; then
            echo "TAG=sffn$i NET=10.214.$i" >"$D/run/vars"
            break
        fi
    done
    [ -s "$D/run/vars" ] || die "no bridge could be made"
    # shellcheck disable=SC1091
    . "$D/run/vars"
    ip addr add "$NET.1/24" dev "$TAG"
    ip link set "$TAG" up
    {
        echo "127.0.0.1 localhost"
        echo "$NET.1 $(hostname -s)"
        for i in "${!NODES[@]}"; do
            echo "$NET.$((11 + i)) ${NODES[i]}"
            echo "::ffff:$NET.$((11 + i)) ${NODES[i]}" # torch asks for a peer's name by this form, and complains on standard error
        done
    } >"$D/hosts"
    # as on Debian: a host's own name is loopback on itself, which is the address that gloo would tell the others
    for node in "${NODES[@]}"; do { echo "127.0.1.1 $node"; cat "$D/hosts"; } >"$D/hosts.$node"; done
    for i in "${!NODES[@]}"; do
        node=$TAG-${NODES[i]}
        ip netns add "$node"
        ip link add "${TAG}v$i" type veth peer name eth0 netns "$node"
        ip link set "${TAG}v$i" master "$TAG" up
        ip -n "$node" link set lo up
        ip -n "$node" addr add "$NET.$((11 + i))/24" dev eth0
        ip -n "$node" link set eth0 up
    done
}
configuration() {
    local i me
    me=$(id -un)
    head -c 128 /dev/urandom >"$D/munge.key"
    chmod 600 "$D/munge.key"
    : >"$D/plugstack.conf"
    {
        cat <<EOF
ClusterName=sffn
SlurmctldHost=$(hostname -s)($NET.1)
SlurmctldPort=26817
SlurmUser=$me
SlurmdUser=$me
AuthType=auth/munge
CredType=cred/munge
# a requeued job waits for cred_expire, by default 120 s
AuthInfo=socket=$D/run/munge.sock,cred_expire=5
CommunicationParameters=NoCtldInAddrAny
StateSaveLocation=$D/state
SlurmdSpoolDir=$D/spool.%n
SlurmctldPidFile=$D/run/slurmctld.pid
SlurmdPidFile=$D/run/slurmd.%n.pid
SlurmctldLogFile=$D/log/slurmctld.log
SlurmdLogFile=$D/log/slurmd.%n.log
PlugStackConfig=$D/plugstack.conf
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
# more CPUs and memory than the machine has
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
# refuse what can never run, in place of letting it wait for ever
EnforcePartLimits=ALL
ReturnToService=2
KillWait=20
SlurmdTimeout=6
MinJobAge=3600
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
EOF
        echo "GresTypes=gpu"
        for i in "${!NODES[@]}"; do
            mkdir -p "$D/spool.${NODES[i]}"
            echo "NodeName=${NODES[i]} NodeAddr=$NET.$((11 + i)) Port=26818 CPUs=4 RealMemory=4000 Gres=gpu:2 State=UNKNOWN"
        done
        echo "PartitionName=main Nodes=ALL Default=YES PriorityTier=5 PreemptMode=OFF"
        echo "PartitionName=low Nodes=ALL PriorityTier=1 GraceTime=60"
        echo "PartitionName=high Nodes=ALL PriorityTier=9"
    } >"$SLURM_CONF"
    # devices that count as GPUs for Slurm, and for nobody else
    for i in 0 1; do ln -s /dev/null "$D/nvidia$i"; done
    echo "Name=gpu File=$D/nvidia[0-1] Flags=nvidia_gpu_env" >"$D/gres.conf"
}

# ---- daemons: each forks away by itself and writes its pid file ----

apart() { # NETNS-or-'' HOSTNAME COMMAND...: with mounts, host name and /etc/hosts of its own
    local netns=$1 hosts=$D/hosts
    shift
    [ -z "$netns" ] || hosts=$D/hosts.$1
    # shellcheck disable=SC2016  # the inner shell expands
    ${netns:+nsenter --net="/run/netns/$netns"} unshare -m -u --propagation private sh -c \
        'mount --bind "$1" /etc/hosts && hostname "$2" && shift 2 && exec "$@"' sh "$hosts" "$@"
}
start_node() { # NODE
    # shellcheck disable=SC1091
    . "$D/run/vars"
    rm -f "$D/run/slurmd.$1.pid"
    apart "$TAG-$1" "$1" slurmd -N "$1" -f "$SLURM_CONF" </dev/null >"$D/log/slurmd.$1.err" 2>&1
    record "slurmd.$1" "$D/run/slurmd.$1.pid"
}
usable() { timeout 10 sinfo -h -N -p main -o '%T' 2>/dev/null | grep -Exc 'idle|mixed|allocated|completing' || true; }

up() {
    local node _
    case $D in /*[!/]) ;; *) die "DIR = $D: must be absolute" ;; esac
    [ ${#D} -le 60 ] || die "DIR = $D: too long for a unix socket"
    [ ! -e "$D" ] || die "DIR = $D: exists"
    mkdir -p "$D"/{run,log,state}
    trap 'down' EXIT
    network
    configuration
    # --force: munged otherwise refuses a socket in a folder that others may not enter
    munged --force --socket="$D/run/munge.sock" --key-file="$D/munge.key" --pid-file="$D/run/munged.pid" \
        --log-file="$D/log/munged.log" --seed-file="$D/run/munged.seed" </dev/null >"$D/log/munged.err" 2>&1
    record munged "$D/run/munged.pid"
    apart '' "$(hostname -s)" slurmctld -f "$SLURM_CONF" </dev/null >"$D/log/slurmctld.err" 2>&1
    record slurmctld "$D/run/slurmctld.pid"
    for node in "${NODES[@]}"; do start_node "$node"; done
    for _ in $(seq 100); do
        if [ "$(usable)" = ${#NODES[@]} ]; then trap - EXIT; return; fi
        sleep 0.1
    done
    die "nodes did not come up: $(sinfo -h -N -o '%N %T %E' 2>&1 | tr '\n' ';')"
}
down() {
    local node pid started ids
    [ -e "$D/run" ] || return 0
    ids=$(timeout 5 squeue -h -o %A 2>/dev/null | sort -u) || true
    # shellcheck disable=SC2086  # a word a job
    [ -z "$ids" ] || timeout 5 scancel --signal=KILL --full $ids 2>/dev/null || true
    for node in "${NODES[@]}"; do daemon "slurmd.$node" TERM; done
    daemon slurmctld TERM
    strays | while read -r pid started; do stop "$pid" "$started" KILL; done
    daemon munged TERM
    if [ -s "$D/run/vars" ]; then
        # shellcheck disable=SC1091
        . "$D/run/vars"
        for node in "${!NODES[@]}"; do
            ip link del "${TAG}v$node" 2>/dev/null || true
            ip netns del "$TAG-${NODES[node]}" 2>/dev/null || true
        done
        ip link del "$TAG" 2>/dev/null || true
    fi
    rm -rf "$D"
}

case ${1:-} in
lacks) lacks ;;
up) up ;;
kill) daemon "slurmd.$3" KILL ;;
start) start_node "$3" ;;
down) down ;;
*) sed -n '2,14s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
