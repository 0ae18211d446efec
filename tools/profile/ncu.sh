#!/usr/bin/env bash
# One kernel, or the kernels of one stage, in Nsight Compute:
#
#   tools/profile/ncu.sh [--dry-run] (--kernel REGEX | --stage STAGE) [--count N] [--skip N] OUT -- ARGS of python -m speedyzero
#   tools/profile/ncu.sh --kernel '_puct_kernel' profile/puct -- --env Pong-v5 --run-dir /tmp/run
#   tools/profile/ncu.sh --stage "2 search" --count 200 profile/search -- --env Pong-v5 --run-dir /tmp/run
#
# Writes OUT.ncu-rep: --count launches (10) that match, after --skip (0) that match, then ends the run. --kernel and --stage may be given
# together. A replayed graph has no ranges, so --stage runs the trainer with --graph off; --kernel alone sees the nodes of the graphs.
#
# On a card that others use, and where only root may set clocks: the clocks stay as they are (--clock-control none). The caches are not
# flushed between the passes (--cache-control none), since in the loop a kernel finds what the one before left in them. Backward's kernels
# come from autograd's own thread: ranges count for the process, not for the thread that opened them.
# --dry-run prints the command and runs nothing. Where there is no ncu, it prints the command and fails.
set -euo pipefail

die() {
    echo "error: $1" >&2
    exit 2
}

usage="usage: ncu.sh [--dry-run] (--kernel REGEX | --stage STAGE) [--count N] [--skip N] OUT -- ARGS of python -m speedyzero"
dry=false kernel="" stage="" count=10 skip=0 out=""
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    case "$1" in
        --dry-run) dry=true ;;
        --kernel | --stage | --count | --skip)
            [ $# -gt 1 ] && [ -n "$2" ] && [ "$2" != -- ] || die "$1: needs a value; $usage"
            case "$1" in
                --kernel) kernel=$2 ;;
                --stage) stage=$2 ;;
                --count) count=$2 ;;
                --skip) skip=$2 ;;
            esac
            shift
            ;;
        -*) die "$1: no such flag, flags of speedyzero come after --; $usage" ;;
        "") die "OUT: is empty; $usage" ;;
        *)
            [ -z "$out" ] || die "$1: there is an OUT already, $out; $usage"
            out=$1
            ;;
    esac
    shift
done
[ $# -gt 0 ] || die "no -- before the flags of speedyzero; $usage"
shift
[ -n "$out" ] || die "no OUT before --; $usage"
[ -n "$kernel$stage" ] || die "neither --kernel nor --stage: every launch of a run would be replayed; $usage"
[[ $count =~ ^[1-9][0-9]*$ ]] || die "--count $count: must be a whole number, at least 1"
[[ $skip =~ ^[0-9]+$ ]] || die "--skip $skip: must be a whole number"
here=$(cd "$(dirname "$0")" && pwd)
root=$(dirname "$(dirname "$here")")

command=(
    ncu --target-processes all --clock-control none --cache-control none --graph-profiling node --set full
    --launch-skip "$skip" --launch-count "$count" --kill yes --force-overwrite --export "$out"
)
if [ -n "$kernel" ]; then
    command+=(--kernel-name "regex:$kernel")
fi
if [ -n "$stage" ]; then
    known=$(grep -o '"[0-9][0-9.]* [^"]*"' "$root/speedyzero/stages.py" | tr -d '"')
    [[ $'\n'$known$'\n' == *$'\n'"$stage"$'\n'* ]] || die "--stage $stage: is none of ${known//$'\n'/, }"
    for argument in "$@"; do
        case "$argument" in
            --graph | --graph=*) die "$argument: --stage sets --graph off by itself; leave the flag out" ;;
        esac
    done
    # ncu writes DOMAIN@RANGE (nsys the other way round); the slash says that it is a push/pop range.
    command+=(--nvtx --nvtx-push-pop-scope process --nvtx-include "speedyzero@$stage/")
    set -- "$@" --graph off
fi
command+=("${PYTHON:-python}" -m speedyzero "$@")

print() {
    printf '%q' "${command[0]}"
    printf ' %q' "${command[@]:1}"
    echo
}

if $dry; then
    print
    exit 0
fi
if ! command -v ncu > /dev/null; then
    print
    echo "error: ncu is not on the PATH; install Nsight Compute and run the command above" >&2
    exit 127
fi
mkdir -p "$(dirname "$out")"
export PYTHONPATH="$root:$root/kernels${PYTHONPATH:+:$PYTHONPATH}"
exec "${command[@]}"
