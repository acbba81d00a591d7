#!/bin/bash
# Trains on one or many nodes: the same command on each of them, with the same arguments as `train`. The run directory
# and the data must be on a disk that they share. A worker that dies is started again, with all others, from the last
# checkpoint.
#   NODES=2 HEAD=node1 launch/torchrun.sh --config configs/cifar10_resnet18.yaml run.dir=/shared/runs/first
# More ranks than 8 want strategy.virtual_ranks=16, say, as well.
# NODES         how many nodes there are; default 1
# HEAD          the hostname of one of them; needed for several nodes
# PORT          a free port there; default 29400
# RANKS         ranks of this node; default: one for each GPU, without a GPU 1
# MAX_RESTARTS  how often the workers are started again; default 3
set -euo pipefail
project=$(cd "$(dirname "$(readlink -f "$0")")/.." && pwd) # a clone, or one of `dist-cifar init`
command -v torchrun >/dev/null || PATH=$project/.venv/bin:$PATH # if no other is active
die() { echo "launch/torchrun.sh: $*" >&2 && exit 2; }
command -v torchrun >/dev/null || die "there is no torchrun; activate the environment that dist_cifar is installed in"
train=("$project/dist_cifar/train.py")
[[ -e ${train[0]} ]] || train=(-m dist_cifar.train) # of the installed package

NODES=${NODES:-1} PORT=${PORT:-29400} MAX_RESTARTS=${MAX_RESTARTS:-3}
. "$project/launch/gpus.sh"
RANKS=${RANKS:-$(count_gpus)}
for name in NODES PORT MAX_RESTARTS RANKS; do
    [[ ${!name} =~ ^(0|[1-9][0-9]*)$ ]] || die "$name wants a number, found '${!name}'"
done
((RANKS)) || RANKS=1
((NODES > 0)) || die "NODES wants at least 1"
[[ $NODES == 1 || -n ${HEAD:-} ]] || die "NODES=$NODES without HEAD; give the name of one node, the same on each"
endpoint=${HEAD:-localhost}:$PORT
here=()
if [[ $NODES == 1 ]]; then
    here=(--local-addr 127.0.0.1) # or torchrun looks up the hostname's
    [[ -n ${HEAD:-} ]] || endpoint=127.0.0.1:0 # a free one
fi

# Errors in the arguments are reported once, and not by every rank of every restart.
python -m dist_cifar train --print-run-dir "$@" >/dev/null
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # or torchrun sets it and says so; each rank sets its own number
exec torchrun --nnodes "$NODES" "${here[@]}" --nproc-per-node "$RANKS" --max-restarts "$MAX_RESTARTS" \
    --rdzv-backend c10d --rdzv-endpoint "$endpoint" --rdzv-id "dist_cifar-$PORT" \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 "${train[@]}" "$@"
