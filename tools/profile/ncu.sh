#!/usr/bin/env bash
# One kernel, or the kernels of one stage, in Nsight Compute:
#
#   tools/profile/ncu.sh [--dry-run] (--kernel REGEX | --stage STAGE) [--count N] [--skip N] OUT -- ARGS of python -m speedyzero
#   tools/profile/ncu.sh --kernel '_puct_kernel' profile/puct -- --env Pong-v5 --run-dir /tmp/run
#   tools/profile/ncu.sh --stage "2 search" --count 200 profile/search -- --env Pong-v5 --run-dir /tmp/run
#
# Writes OUT.ncu-rep: --count launches (10) that match, after --skip (0) that match, then ends the run. --kernel and --stage may be given
# together. A replayed graph has no ranges, so --stage runs the trainer with --graph off; --kernel alone sees the nodes of the graphs.
# Clocks stay as they are, since only root may set them. The caches are not flushed between the passes, since in the loop a kernel finds
# what the one before left in them. Backward's kernels come from autograd's own thread: so ranges count for the process.
# --dry-run prints the command and runs nothing.
set -euo pipefail
die() { echo "error: $1" >&2; exit 2; }
dry=false kernel="" stage="" count=10 skip=0
while [[ ${1-} == --* && $1 != -- ]]; do
    case $1 in
        --dry-run) dry=true; shift ;;
        --kernel | --stage | --count | --skip) declare "${1#--}=${2:?$1 needs a value}"; shift 2 ;;
        *) die "$1: no such flag; flags of speedyzero come after --" ;;
    esac
done
[[ $# -ge 2 && $2 == -- ]] || die "usage: ncu.sh [--dry-run] (--kernel REGEX | --stage STAGE) [--count N] [--skip N] OUT -- ARGS of python -m speedyzero"
[ -n "$kernel$stage" ] || die "neither --kernel nor --stage: every launch of a run would be replayed"
out=$1; shift 2
root=$(cd "$(dirname "$0")/../.." && pwd)
command=(
    ncu --target-processes all --clock-control none --cache-control none --graph-profiling node --set full
    --launch-skip "$skip" --launch-count "$count" --kill yes --force-overwrite --export "$out"
)
[ -z "$kernel" ] || command+=(--kernel-name "regex:$kernel")
if [ -n "$stage" ]; then
    grep -qF "\"$stage\"" "$root/speedyzero/stages.py" || die "--stage $stage: is no stage of speedyzero/stages.py"
    # ncu writes DOMAIN@RANGE (nsys the other way round); the slash says that it is a push/pop range.
    command+=(--nvtx --nvtx-push-pop-scope process --nvtx-include "speedyzero@$stage/")
    set -- "$@" --graph off
fi
command+=("${PYTHON:-python3}" -m speedyzero "$@")
if $dry; then printf '%q ' "${command[@]}"; exit; fi
command -v ncu > /dev/null || die "ncu is not on the PATH; install Nsight Compute"
mkdir -p "$(dirname "$out")"
export PYTHONPATH="$root:$root/kernels${PYTHONPATH:+:$PYTHONPATH}"
exec "${command[@]}"
