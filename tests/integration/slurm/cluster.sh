#!/usr/bin/env bash
# A real SLURM cluster on this machine, for the tests. It needs root, Debian's slurmctld, slurmd, slurm-client, munge and
# iproute2, and a kernel with the freezer of cgroup v1.
#
#   up N              brings up slurmctld and 2 to 4 nodes, after `down`; returns when every node is idle
#   down              ends every process of the cluster and removes everything that it made; an error if anything is left
#   fail NODE [cut]   kills all that runs on a node; with cut only its link goes down: it runs on, peers hear silence
#   heal NODE         sets the link up again, and boots the node if it is dead
#   inside NODE CMD   runs a command on a node
#   status            nodes and jobs
#   env               what a client needs:  eval "$(tests/integration/slurm/cluster.sh env)"
#
# Its state lies in $DIST_CIFAR_CLUSTER (/run/dist_cifar_slurm), from which it takes its other names too: clusters in
# different directories do not meet. A node has its own network, process table, hostname, /dev/shm, IPC and cgroups; it
# shares every other file with this machine, and has no route outside. Its GPUs are fakes. The kernel kills all of a node
# with its process 1. Each node is also one cgroup, so what belongs to it is known even when whoever started it is gone.
set -euo pipefail

root=${DIST_CIFAR_CLUSTER:-/run/dist_cifar_slurm}
key=$(($(cksum <<<"$root" | cut -d' ' -f1) % 512))
name=dist_cifar_$key # of the cgroup; links are dc$key-NODE
bridge=dc$key # a link's name has 15 characters at most
# 198.18.0.0/15 is for tests between networks (RFC 2544): nobody's own network. Node i is .i, and this machine .253.
subnet=198.$((18 + key / 256)).$((key % 256))
export SLURM_CONF=$root/etc/slurm.conf

die() {
    echo "cluster.sh: $*" >&2
    exit 1
}

usage() {
    sed -n '4,12s/^#  *//p' "$0" >&2
    exit 2
}

configure() { # configure N
    mkdir -p "$root"/{log,munge,gpus,state,spool}
    chmod 755 "$root" "$root/munge"
    (umask 077 && head -c 128 /dev/urandom >"$root/munge/key")
    echo "$PPID" >"$root/owner"
    # slurmd accepts character devices only as GPUs: these are other names of /dev/null.
    for i in 0 1 2 3; do mknod -m 666 "$root/gpus/nvidia$i" c 1 3; done
    echo "Name=gpu File=$root/gpus/nvidia[0-3]" >"$root/etc/gres.conf"
    printf '%s\n' CgroupPlugin=cgroup/v1 CgroupAutomount=no "CgroupMountpoint=$root/cgroup" >"$root/etc/cgroup.conf"
    cp /etc/hosts "$root/etc/hosts"
    echo "$subnet.254 head" >>"$root/etc/hosts"
    cat >"$SLURM_CONF" <<END
ClusterName=dist_cifar
SlurmctldHost=head($subnet.254)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job waits for cred_expire seconds before it starts again: 120 by default, 5 at least.
AuthInfo=socket=$root/munge/socket,cred_expire=5
SlurmctldPidFile=$root/state/slurmctld.pid
SlurmctldLogFile=$root/log/slurmctld.log
StateSaveLocation=$root/state
SlurmdPidFile=$root/spool/%n/slurmd.pid
SlurmdLogFile=$root/log/%n.log
SlurmdSpoolDir=$root/spool/%n
MailProg=/bin/true
MpiDefault=none
# As on real clusters a signal reaches the tasks; proctrack/linuxproc would give it to their whole process tree.
ProctrackType=proctrack/cgroup
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=1000
# The hardware is what this file says, whatever this machine has.
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
        echo "NodeName=node$i NodeAddr=$subnet.$i CPUs=8 RealMemory=64000 Gres=gpu:4 Feature=a100,h100" >>"$SLURM_CONF"
    done
}

boot() { # boot MACHINE ADDRESS
    local group=$root/cgroup/freezer/$name/$1 init
    mkdir -p "$group" "$root/spool/$1"
    (
        echo "$BASHPID" >"$group/cgroup.procs"
        exec env -i PATH="$PATH:/usr/sbin:/sbin" DIST_CIFAR_CLUSTER="$root" setsid --fork \
            unshare --net --mount --uts --ipc --pid --fork --kill-child --mount-proc \
            bash "$0" live "$1" "$2" </dev/null &>"$root/log/$1.out"
    )
    until init=$(init_of "$1"); do sleep 0.02; done
    ip link delete "$bridge-$1" 2>/dev/null || true # the kernel removes a dead node's link some time later
    # Always the same address on the link: the others remember it for minutes after the node has died.
    ip link add "$bridge-$1" type veth peer name eth0 address "$(printf '02:dc:00:00:00:%02x' "${2##*.}")" netns "$init"
    ip link set "$bridge-$1" master "$bridge" up
}

live() { # live MACHINE ADDRESS: process 1 of a machine
    hostname "$1"
    mount -t tmpfs -o mode=1777 tmpfs /dev/shm
    mount --bind "$root/etc/hosts" /etc/hosts
    # Where a job's environment has no SLURM_CONF; Debian's packages make the directory.
    [[ ! -d /etc/slurm ]] || mount --bind "$root/etc" /etc/slurm
    # The cgroups of its jobs come below its own.
    mount --bind "$root/cgroup/freezer/$name/$1" "$root/cgroup/freezer"
    ip link set lo up
    until ip link set eth0 up 2>/dev/null; do sleep 0.02; done
    ip address add "$2/24" dev eth0
    if [[ $1 == head ]]; then
        munged --foreground --key-file="$root/munge/key" --socket="$root/munge/socket" --pid-file="$root/munge/pid" \
            --log-file="$root/munge/log" --seed-file="$root/munge/seed" &
        until [[ -S $root/munge/socket ]]; do sleep 0.02; done
        slurmctld -D -c &
    else
        slurmd -D -N "$1" &
    fi
    # It inherits orphans and outlives its slurmd, as a real machine does.
    while :; do wait && sleep 1; done
}

init_of() { # init_of NODE: its process 1, by the number that it has here
    local pid ids
    while read -r pid; do
        read -ra ids < <(grep -s ^NSpid: "/proc/$pid/status") || continue
        # The machine may itself be a container: of the ids that a process has, from outermost to innermost, 2 are ours.
        if ((${#ids[@]} > 2 && ids[-1] == 1)); then
            echo "$pid"
            return
        fi
    done < <(cat "$root/cgroup/freezer/$name/$1/cgroup.procs" 2>/dev/null)
    return 1
}

groups_in() { find "$1" -depth -type d 2>/dev/null || true; }

members() { groups_in "$1" | sed 's|$|/cgroup.procs|' | xargs --no-run-if-empty cat 2>/dev/null || true; }

end() { # end GROUP: kills every process of a cgroup, waits until the last is gone, and removes it
    local group deadline=$((SECONDS + 20))
    [[ -d $1 ]] || return 0
    until [[ -z $(members "$1") ]]; do
        ((SECONDS < deadline)) || die "processes that cannot be killed: $(members "$1" | xargs)"
        # Frozen first: else a slurmstepd would live to report the death of its tasks, which a dead node cannot.
        echo FROZEN >"$1/freezer.state"
        members "$1" | xargs --no-run-if-empty kill -KILL 2>/dev/null || true
        # The frozen do not die, and slurmd may just have frozen a step.
        groups_in "$1" | while read -r group; do echo THAWED >"$group/freezer.state" || true; done 2>/dev/null
        sleep 0.02
    done
    until [[ ! -d $1 ]]; do
        ((SECONDS < deadline)) || die "a cgroup that cannot be removed: $1"
        groups_in "$1" | xargs --no-run-if-empty rmdir 2>/dev/null || sleep 0.02
    done
}

up() { # up N
    [[ $1 =~ ^[2-4]$ ]] || usage
    for command in slurmctld slurmd sbatch munged ip; do
        command -v "$command" >/dev/null || die "$command is not installed; make test-slurm installs it"
    done
    local owner
    owner=$(cat "$root/owner" 2>/dev/null || echo $PPID)
    if [[ $owner != "$PPID" ]] && kill -0 "$owner" 2>/dev/null; then
        die "process $owner, which still runs, has brought up a cluster in $root; end it with: $0 down"
    fi
    mount_freezer
    down
    mount_freezer
    configure "$1"
    ip link add "$bridge" type bridge
    ip address add "$subnet.253/24" dev "$bridge"
    ip link set "$bridge" up
    boot head "$subnet.254"
    for ((i = 1; i <= $1; i++)); do boot "node$i" "$subnet.$i"; done
    for ((SECONDS = 0; SECONDS < 120; )); do
        (($(timeout 5 sinfo --noheader --Node --partition=debug --format=%T 2>/dev/null | grep -cx idle) != $1)) || return 0
        sleep 0.1
    done
    tail -n 5 "$root"/log/* >&2
    down
    die "the nodes were not idle within 120 s"
}

down() {
    end "$root/cgroup/freezer/$name"
    local link
    for link in $(ip -o link show | grep -oE " $bridge(-[a-z0-9]+)?[@:]" | tr -d ' @:'); do
        ip link delete "$link" 2>/dev/null || true # the kernel may be faster: a link goes with its node
    done
    umount "$root/cgroup/freezer"
    rm -rf --one-file-system "$root"
}

mount_freezer() {
    mkdir -p "$root/cgroup/freezer" "$root/etc"
    mount -t cgroup -o freezer cgroup "$root/cgroup/freezer" || die "this kernel has no freezer of cgroup v1"
}

inside() { # inside NODE COMMAND...
    local init
    init=$(init_of "$1") || die "$1 is dead"
    echo $$ >"$root/cgroup/freezer/$name/$1/cgroup.procs"
    exec nsenter --target "$init" --mount --uts --ipc --net --pid -- "${@:2}"
}

command=${1:-}
case $command in
up | down | fail | heal | inside | live) ;;
status) exec sh -c 'scontrol ping && sinfo --Node --partition=debug && squeue' ;;
env) echo "export SLURM_CONF=$SLURM_CONF" && exit ;;
*) usage ;;
esac
[[ $(id -u) == 0 ]] || die "it needs root"
[[ $command != live ]] || live "${@:2}"
# What this script mounts is seen by itself and the nodes, and goes with them.
if [[ -z ${CLUSTER_SH_INSIDE:-} ]]; then
    CLUSTER_SH_INSIDE=1 exec unshare --mount "$0" "$@"
fi
unset CLUSTER_SH_INSIDE
if [[ $command == up ]]; then
    up "${2:-}"
    exit
fi
[[ $command == down || -d $root/cgroup ]] || die "there is no cluster in $root"
mount_freezer
case $command in
down) down ;;
fail) if [[ ${3:-} == cut ]]; then ip link set "$bridge-$2" down; else end "$root/cgroup/freezer/$name/$2"; fi ;;
heal) if init_of "$2" >/dev/null; then ip link set "$bridge-$2" up; else boot "$2" "$subnet.${2#node}"; fi ;;
inside) inside "${@:2}" ;;
esac
