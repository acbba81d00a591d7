#!/bin/bash
# A real SLURM cluster of 1 to 4 nodes on this machine, for the tests. Root; Debian's slurmctld, slurmd, slurm-client,
# munge and iproute2.
#
#   up [N=2]          slurmctld and N slurmd; returns when every node is idle. Begins with `down`.
#   down              ends every process of it and removes what it has made
#   fail NODE [cut]   the node's processes are killed; with cut they go on, and only its network cable is pulled
#   heal NODE         plugs the cable in again, and boots the node if it is off
#   inside NODE CMD   runs a command in the node: its network, hostname, processes, /dev/shm
#   conf              the path for SLURM_CONF
#
# A node is a set of namespaces (network, mount, UTS, IPC, pid) with a bash as its process 1: when that is killed the
# kernel kills all others in it. Each node has an address, a hostname, a /dev/shm, a process table and a cgroup freezer of
# its own, so that signals go where they go on a real cluster. /tmp and everything else is shared. GPUs are fakes.
set -uo pipefail

root=/run/dist_cifar_slurm
subnet=10.83.0 bridge=dcslurm0 controller=$(hostname -s)
export SLURM_CONF=$root/etc/slurm.conf

die() { echo "cluster.sh: $*" >&2 && exit 1; }

configure() { # configure N
    mkdir -p "$root"/{etc,log,state,spool,pids,gpus,munge}
    chmod 755 "$root" "$root/munge"
    (umask 077 && head -c 128 /dev/urandom >"$root/munge/key")
    for i in 0 1 2 3; do mknod -m 666 "$root/gpus/nvidia$i" c 1 3; done
    grep -v "$subnet\." /etc/hosts >"$root/etc/hosts"
    echo "$subnet.254 $controller" >>"$root/etc/hosts"
    cat >"$SLURM_CONF" <<END
ClusterName=dist_cifar
SlurmctldHost=$controller($subnet.254)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# cred_expire is how long a requeued job waits before it starts again: 120 by default, and for less than 5
AuthInfo=socket=$root/munge/socket,cred_expire=5
SlurmctldPidFile=$root/pids/slurmctld.own
SlurmdPidFile=$root/pids/%n.own
SlurmctldLogFile=$root/log/slurmctld.log
SlurmdLogFile=$root/log/%n.log
StateSaveLocation=$root/state
SlurmdSpoolDir=$root/spool/%n
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/cgroup
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=1000
SlurmdParameters=config_overrides
GresTypes=gpu
JobRequeue=1
ReturnToService=2
KillWait=10
SlurmdTimeout=8
MessageTimeout=5
TCPTimeout=2
MinJobAge=86400
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,bf_interval=1,sched_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=debug Default=YES Nodes=ALL MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=high Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
END
    for ((i = 1; i <= $1; i++)); do
        echo "$subnet.$i node$i" >>"$root/etc/hosts"
        echo "NodeName=node$i NodeAddr=$subnet.$i CPUs=8 RealMemory=64000 Gres=gpu:h100:4 Feature=a100,h100" >>"$SLURM_CONF"
    done
    echo "Name=gpu Type=h100 File=$root/gpus/nvidia[0-3]" >"$root/etc/gres.conf"
    printf 'CgroupPlugin=cgroup/v1\nCgroupMountpoint=%s/cgroup\nCgroupAutomount=yes\n' "$root" >"$root/etc/cgroup.conf"
    mkdir -p "$root/cgroup"
}

boot() { # boot NODE
    local netns=dc-$1 address=$subnet.${1#node}
    mkdir -p "$root/spool/$1"
    if [[ ! -e /run/netns/$netns ]]; then
        ip netns add "$netns"
        ip link add "$netns" type veth peer name eth0 netns "$netns" && ip link set "$netns" master $bridge up
        ip -n "$netns" link set lo up && ip -n "$netns" addr add "$address/24" dev eth0 && ip -n "$netns" link set eth0 up
    fi || die "no network for $1"
    env -i PATH="$PATH" SLURM_CONF="$SLURM_CONF" setsid nsenter --net="/run/netns/$netns" \
        unshare --mount --uts --ipc --pid --fork --kill-child --mount-proc bash -c '
            hostname "$1" && mount --bind "$0/etc/hosts" /etc/hosts && mount -t tmpfs -o mode=1777 tmpfs /dev/shm || exit
            mkdir -p /etc/slurm && mount --bind "$0/etc" /etc/slurm
            slurmd -D -N "$1" &
            while :; do wait; sleep 1; done' "$root" "$1" >"$root/log/$1.out" 2>&1 </dev/null &
    echo $! >"$root/pids/$1"
}

alive() { # alive PID: not gone, and no zombie
    local state
    state=$(awk '/^State/ {print $2}' "/proc/$1/status" 2>/dev/null)
    [[ -n $state && $state != Z ]]
}

end() { # end NAME SIGNAL: one of our processes, by its recorded number
    local pid
    pid=$(cat "$root/pids/$1" 2>/dev/null) || return 0
    if grep -qzE 'slurm|munged|unshare|nsenter' "/proc/$pid/cmdline" 2>/dev/null; then
        kill "-$2" "$pid" 2>/dev/null
        for _ in {1..100}; do alive "$pid" || break; sleep 0.05; done
    fi
    rm -f "$root/pids/$1"
}

up() { # up N
    [[ $(id -u) == 0 ]] || die "it needs root"
    command -v slurmctld slurmd munged ip >/dev/null || die "slurmctld, slurmd, munge or iproute2 is not installed"
    down
    configure "$1"
    ip link add $bridge type bridge && ip addr add $subnet.254/24 dev $bridge && ip link set $bridge up || die "no bridge"
    munged --force --key-file="$root/munge/key" --socket="$root/munge/socket" --pid-file="$root/pids/munged" \
        --log-file="$root/munge/log" --seed-file="$root/munge/seed" || die "munged does not start"
    setsid slurmctld -D -c >"$root/log/slurmctld.out" 2>&1 </dev/null &
    echo $! >"$root/pids/slurmctld"
    for ((i = 1; i <= $1; i++)); do boot "node$i"; done
    for _ in {1..200}; do
        (($(timeout 5 sinfo -h -N -p debug -o %T 2>/dev/null | grep -cx idle) == $1)) && return
        sleep 0.1
    done
    tail -n 5 "$root"/log/* >&2
    die "the cluster is not ready"
}

down() {
    local name
    for name in $(ls "$root/pids" 2>/dev/null | grep -x 'node[0-9]'); do end "$name" KILL & done
    wait
    end slurmctld TERM
    end munged TERM
    for name in $(ip netns list 2>/dev/null | awk '/^dc-node/ {print $1}'); do
        ip link del "$name" 2>/dev/null
        ip netns del "$name"
    done
    ip link del $bridge 2>/dev/null
    if [[ -d $root/cgroup ]]; then # what slurmd made in the freezer's hierarchy outlives its mount
        unshare --mount bash -c 'mount -t cgroup -o freezer cgroup "$0" && for _ in {1..40}; do
            ls -d "$0"/slurm_node* >/dev/null 2>&1 || break
            find "$0"/slurm_node* -depth -type d -exec rmdir {} + 2>/dev/null
            sleep 0.05
        done' "$root/cgroup"
    fi
    rm -rf "$root"
}

case ${1:-} in
up) up "${2:-2}" ;;
down) down ;;
fail) if [[ ${3:-} == cut ]]; then ip link set "dc-$2" down; else end "$2" KILL; fi ;;
heal)
    ip link set "dc-$2" up
    alive "$(cat "$root/pids/$2" 2>/dev/null || echo none)" || boot "$2"
    ;;
inside)
    pid=$(cat "$root/pids/$2") || die "$2 is off"
    child=$(cat "/proc/$pid/task/$pid/children")
    exec nsenter --target "${child%% *}" --mount --uts --ipc --net --pid -- "${@:3}"
    ;;
conf) echo "$SLURM_CONF" ;;
*) sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2 && exit 2 ;;
esac
