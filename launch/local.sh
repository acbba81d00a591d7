#!/bin/bash
# Trains on this machine, with all its GPUs or, where it has none, with CPU ranks (2 unless --ranks says otherwise).
# A rank that dies is started again, with all others, from the last checkpoint (launch/torchrun.sh).
#   launch/local.sh [--ranks N] --config configs/cifar10_resnet18.yaml run.dir=runs/first
# MAX_RESTARTS  how often the ranks are started again; default 3
set -euo pipefail
project=$(cd "$(dirname "$(readlink -f "$0")")/.." && pwd) # a clone, or one of `dist-cifar init`
command -v torchrun >/dev/null || PATH=$project/.venv/bin:$PATH # if no other is active
die() { echo "launch/local.sh: $*" >&2 && exit 2; }
command -v torchrun >/dev/null || die "there is no torchrun; activate the environment that dist_cifar is installed in"

if [[ ${1:-} == --ranks ]]; then
    [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || die "--ranks wants a number, found '${2:-}'"
    ranks=$2 && shift 2
else
    . "$project/launch/gpus.sh"
    ranks=$(count_gpus)
fi
if ((ranks == 0)); then
    echo "launch/local.sh: no GPU; 2 CPU ranks" >&2
    ranks=2
fi
NODES=1 HEAD='' RANKS=$ranks exec "$project/launch/torchrun.sh" "$@"
