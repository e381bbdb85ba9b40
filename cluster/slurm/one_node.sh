#!/usr/bin/env bash
# A SLURM of one node, this machine, to try the recipe without a cluster. Debian or Ubuntu, as root; needs no systemd and no
# cgroups, so it runs in a container. Not for real use: no accounting, no limits on memory, everything runs as root.
#
#   one_node.sh start [CPUS]   install, if missing, and start munged, slurmctld, slurmd; CPUS may exceed those of the machine
#   one_node.sh stop           cancel all jobs, stop the three and delete what they wrote
set -euo pipefail

HOME_DIR=${ONE_NODE_SLURM:-/var/tmp/one-node-slurm}
export SLURM_CONF=$HOME_DIR/slurm.conf

install_packages() {
    local name missing=
    for name in slurmctld slurmd sbatch munged; do command -v "$name" >/dev/null || missing=yes; done
    if [[ -z $missing ]]; then return; fi
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends slurmctld slurmd slurm-client munge
}

configure() {
    local cpus=$1 host memory
    host=$(hostname -s)
    memory=$(awk '/MemTotal/ {print int($2 / 1024 * 0.9)}' /proc/meminfo)
    mkdir -p "$HOME_DIR"/{state,spool}
    cat >"$SLURM_CONF" <<CONF
ClusterName=onenode
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
# Nothing that needs cgroups.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
# The node may claim more CPUs than there are.
SlurmdParameters=config_overrides
ReturnToService=2
# Seconds between the end of the walltime (SIGTERM) and SIGKILL, as on most clusters.
KillWait=30
SchedulerParameters=sched_interval=5,sched_min_interval=500000
StateSaveLocation=$HOME_DIR/state
SlurmdSpoolDir=$HOME_DIR/spool
SlurmctldLogFile=$HOME_DIR/slurmctld.log
SlurmdLogFile=$HOME_DIR/slurmd.log
SlurmctldPidFile=$HOME_DIR/slurmctld.pid
SlurmdPidFile=$HOME_DIR/slurmd.pid
NodeName=$host NodeAddr=127.0.0.1 CPUs=$cpus RealMemory=$memory State=UNKNOWN
PartitionName=main Nodes=$host Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
CONF
    echo "CgroupAutomount=no" >"$HOME_DIR/cgroup.conf"
}

start() {
    install_packages
    configure "${1:-$(nproc)}"
    install -d -o munge -g munge -m 0755 /run/munge
    # munged forks only when it answers.
    pgrep -x munged >/dev/null || runuser -u munge -- munged --pid-file="/run/munge/munged.pid"
    slurmctld -c
    slurmd -N "$(hostname -s)"
    for _ in $(seq 30); do
        [[ $(sinfo --noheader --format=%t 2>/dev/null) == idle ]] && break
        sleep 1
    done
    sinfo --long
    echo "Now: export SLURM_CONF=$SLURM_CONF"
}

stop() {
    local name
    if scancel --user=root 2>/dev/null; then
        for _ in $(seq 60); do
            if [[ -z $(squeue --noheader 2>/dev/null) ]]; then break; fi
            sleep 1
        done
    fi
    for name in slurmd slurmctld; do
        if [[ -f $HOME_DIR/$name.pid ]]; then kill "$(<"$HOME_DIR/$name.pid")" || true; fi
    done
    if [[ -f /run/munge/munged.pid ]]; then kill "$(</run/munge/munged.pid)" || true; fi
    sleep 2
    rm -rf "$HOME_DIR"
}

case ${1:-} in
start | stop) "$@" ;;
*)
    sed -n '2,6s/^# \{0,1\}//p' "$0"
    exit 2
    ;;
esac
