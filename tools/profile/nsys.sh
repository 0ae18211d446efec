#!/usr/bin/env bash
# A timeline of a training run in Nsight Systems, every kernel of every CUDA graph a node of its own:
#
#   tools/profile/nsys.sh [--dry-run] [--delay S] [--duration S] [--range STAGE] [OUT] -- ARGS of python -m speedyzero
#   tools/profile/nsys.sh profile/pong -- --env Pong-v5 --run-dir /tmp/run
#   tools/profile/nsys.sh --range "5 learn" profile/learn -- --env Pong-v5 --graph off --run-dir /tmp/run
#
# Writes OUT.nsys-rep (profile/speedyzero unless given). It records --duration seconds (10) from --delay seconds (60: past the start, the
# captures and the compilation of kernels) on, then ends the run. With --range it records the first such stage of speedyzero/stages.py
# instead; a replayed graph has no ranges, so give --graph off as well. --dry-run prints the command and runs nothing. Where there is no
# nsys, it prints the command and fails.
set -euo pipefail

die() {
    echo "error: $1" >&2
    exit 2
}

usage="usage: nsys.sh [--dry-run] [--delay S] [--duration S] [--range STAGE] [OUT] -- ARGS of python -m speedyzero"
dry=false delay=60 duration=10 range="" out=""
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    case "$1" in
        --dry-run) dry=true ;;
        --delay | --duration | --range)
            [ $# -gt 1 ] && [ -n "$2" ] && [ "$2" != -- ] || die "$1: needs a value; $usage"
            case "$1" in
                --delay) delay=$2 ;;
                --duration) duration=$2 ;;
                --range) range=$2 ;;
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
[[ $delay =~ ^[0-9]+$ ]] || die "--delay $delay: must be whole seconds"
[[ $duration =~ ^[1-9][0-9]*$ ]] || die "--duration $duration: must be whole seconds, at least 1"
out=${out:-profile/speedyzero}
here=$(cd "$(dirname "$0")" && pwd)
root=$(dirname "$(dirname "$here")")

command=(
    nsys profile "--trace=cuda,nvtx,osrt" --cuda-graph-trace=node --sample=none --cpuctxsw=none
    --force-overwrite=true "--output=$out"
)
if [ -n "$range" ]; then
    known=$(grep -o '"[0-9][0-9.]* [^"]*"' "$root/speedyzero/stages.py" | tr -d '"')
    [[ $'\n'$known$'\n' == *$'\n'"$range"$'\n'* ]] || die "--range $range: is none of ${known//$'\n'/, }"
    # nsys writes RANGE@DOMAIN (ncu the other way round).
    command+=(--capture-range=nvtx "--nvtx-capture=$range@speedyzero" --capture-range-end=stop-shutdown)
else
    command+=("--delay=$delay" "--duration=$duration")
fi
command+=(--kill=sigterm "${PYTHON:-python}" -m speedyzero "$@")

print() {
    printf '%q' "${command[0]}"
    printf ' %q' "${command[@]:1}"
    echo
}

if $dry; then
    print
    exit 0
fi
if ! command -v nsys > /dev/null; then
    print
    echo "error: nsys is not on the PATH; install Nsight Systems and run the command above" >&2
    exit 127
fi
mkdir -p "$(dirname "$out")"
export PYTHONPATH="$root:$root/kernels${PYTHONPATH:+:$PYTHONPATH}"
exec "${command[@]}"
