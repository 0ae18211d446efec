#!/usr/bin/env bash
# A timeline of a training run in Nsight Systems, every kernel of every CUDA graph a node of its own:
#
#   tools/profile/nsys.sh [--dry-run] [--delay S] [--duration S] [--range STAGE] OUT -- ARGS of python -m speedyzero
#   tools/profile/nsys.sh profile/pong -- --env Pong-v5 --run-dir /tmp/run
#   tools/profile/nsys.sh --range "5 learn" profile/learn -- --env Pong-v5 --graph off --run-dir /tmp/run
#
# Writes OUT.nsys-rep. Records --duration seconds (10) after --delay seconds (60: past the start, the captures and the compilation of
# kernels), then ends the run. With --range it records the first such stage of speedyzero/stages.py instead; a replayed graph has no
# ranges, so give --graph off as well. --dry-run prints the command and runs nothing.
set -euo pipefail
die() { echo "error: $1" >&2; exit 2; }
dry=false delay=60 duration=10 range=""
while [[ ${1-} == --* && $1 != -- ]]; do
    case $1 in
        --dry-run) dry=true; shift ;;
        --delay | --duration | --range) declare "${1#--}=${2:?$1 needs a value}"; shift 2 ;;
        *) die "$1: no such flag; flags of speedyzero come after --" ;;
    esac
done
[[ $# -ge 2 && $2 == -- ]] || die "usage: nsys.sh [--dry-run] [--delay S] [--duration S] [--range STAGE] OUT -- ARGS of python -m speedyzero"
out=$1; shift 2
root=$(cd "$(dirname "$0")/../.." && pwd)
command=(
    nsys profile "--trace=cuda,nvtx,osrt" --cuda-graph-trace=node --sample=none --cpuctxsw=none --force-overwrite=true "--output=$out"
)
if [ -n "$range" ]; then
    grep -qF "\"$range\"" "$root/speedyzero/stages.py" || die "--range $range: is no stage of speedyzero/stages.py"
    # nsys writes RANGE@DOMAIN (ncu the other way round).
    command+=(--capture-range=nvtx "--nvtx-capture=$range@speedyzero" --capture-range-end=stop-shutdown)
else
    command+=("--delay=$delay" "--duration=$duration")
fi
command+=(--kill=sigterm "${PYTHON:-python3}" -m speedyzero "$@")
if $dry; then printf '%q ' "${command[@]}"; exit; fi
command -v nsys > /dev/null || die "nsys is not on the PATH; install Nsight Systems"
mkdir -p "$(dirname "$out")"
export PYTHONPATH="$root:$root/kernels${PYTHONPATH:+:$PYTHONPATH}"
exec "${command[@]}"
