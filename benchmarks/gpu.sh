#!/bin/bash
# Everything that only a GPU can tell, in about ten minutes on one or eight of them: one JSON and one page to send back.
#   benchmarks/gpu.sh                       # writes gpu.json and gpu.md in the current folder
#   benchmarks/gpu.sh --out FOLDER
# On a machine without a GPU it runs the same parts on the CPU, small.
set -euo pipefail
project=$(cd "$(dirname "$(readlink -f "$0")")/.." && pwd)
[[ -n ${VIRTUAL_ENV:-} || ! -e $project/.venv/bin/python ]] || PATH=$project/.venv/bin:$PATH
export PYTHONPATH=$project${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
exec python "$project/benchmarks/suite/gpu.py" "$@"
