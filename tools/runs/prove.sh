#!/usr/bin/env bash
# One call on a machine that is lent for minutes: start or resume one run, stop it in time, and leave what a report needs in OUT_DIR:
#
#   tools/runs/prove.sh [--dry-run] [--margin S] OUT_DIR SECONDS -- ARGS of python -m speedyzero, with --run-dir
#   tools/runs/prove.sh OUT_DIR 580 -- --env Pong-v5 --preset efficientzero --seed 0 --run-dir runs/pong0
#
# The same command again goes on where the last call stopped, with the run directory, which stays; it needs no other state. The call takes
# at most SECONDS. --margin seconds (45) before their end the trainer gets SIGUSR1 and saves; a third of the margin before the end it is
# killed, which costs the work since the last checkpoint. A run that is complete is reported again. OUT_DIR gets status.json, log.txt,
# copies of metrics.jsonl, config.json, eval.json and summary.json, and curve.csv and curve.png of curve.py: eight files at most, those of
# an earlier call replaced. --dry-run prints the trainer's command and runs nothing. The exit code is 0 if the run is complete, or stopped
# by this script and saved, else the trainer's.
set -euo pipefail

die() {
    echo "error: $1" >&2
    exit 2
}

usage="usage: prove.sh [--dry-run] [--margin S] OUT_DIR SECONDS -- ARGS of python -m speedyzero, with --run-dir"
copied=(metrics.jsonl config.json eval.json summary.json)
files=("${copied[@]}" log.txt curve.csv curve.png)
dry=false margin=45 out="" limit=""
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    case "$1" in
        --dry-run) dry=true ;;
        --margin)
            [ $# -gt 1 ] && [ -n "$2" ] && [ "$2" != -- ] || die "$1: needs a value; $usage"
            margin=$2
            shift
            ;;
        -*) die "$1: no such flag, flags of speedyzero come after --; $usage" ;;
        "") die "OUT_DIR or SECONDS is empty; $usage" ;;
        *)
            if [ -z "$out" ]; then
                out=$1
            else
                [ -z "$limit" ] || die "$1: there are OUT_DIR and SECONDS already; $usage"
                limit=$1
            fi
            ;;
    esac
    shift
done
[ $# -gt 0 ] || die "no -- before the flags of speedyzero; $usage"
shift
[ -n "$limit" ] || die "no OUT_DIR and SECONDS before --; $usage"
[[ $margin =~ ^[1-9][0-9]{0,5}$ ]] && [ "$margin" -ge 3 ] || die "--margin $margin: must be whole seconds, at least 3"
[[ $limit =~ ^[1-9][0-9]{0,6}$ ]] && [ "$limit" -gt "$margin" ] || die "SECONDS $limit: must be whole seconds, more than --margin $margin"

run="" previous=""
for word in "$@"; do
    case "$word" in
        --resume | --no-resume) die "$word: leave it out, a run that is there is resumed" ;;
        --dry-run) die "$word: give it before --" ;;
        --run-dir=* | --run_dir=*) run=${word#*=} ;;
    esac
    case "$previous" in --run-dir | --run_dir) run=$word ;; esac
    previous=$word
done
[ -n "$run" ] || die "no --run-dir after --; $usage"
full_out=$(realpath -m -- "$out") full_run=$(realpath -m -- "$run")
[[ $full_out/ != "$full_run"/* ]] || die "OUT_DIR $out: lies in --run-dir $run; give another"

python=${PYTHON:-python}
here=$(cd "$(dirname "$0")" && pwd)
root=$(dirname "$(dirname "$here")")
command=("$python" -m speedyzero "$@")
[ ! -e "$run/config.json" ] || command+=(--resume)
if $dry; then
    printf '%q' "${command[0]}"
    printf ' %q' "${command[@]:1}"
    echo
    exit 0
fi

if [ -e "$out" ] && [ ! -e "$out/status.json" ]; then
    [ -d "$out" ] || die "OUT_DIR $out: is no folder; give another"
    for name in "${files[@]}"; do
        [ ! -e "$out/$name" ] || die "OUT_DIR $out: has a $name that is not of prove.sh; give another"
    done
fi
mkdir -p "$out" 2> /dev/null && [ -w "$out" ] || die "OUT_DIR $out: cannot be written; give another"
for name in "${files[@]}" status.json; do rm -f "$out/$name"; done
export PYTHONPATH="$root:$root/kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
log=$out/log.txt
: > "$log"

# Of the first GPU that is in use; the fields are those of prove_status.py.
gpu="" gpu_at_start=""
sample() {
    command -v nvidia-smi > /dev/null || return 0
    local fields=name,driver_version,memory.total,memory.used,utilization.gpu,clocks.sm,clocks.max.sm,power.draw,power.limit,temperature.gpu
    gpu=$(timeout 5 nvidia-smi --query-gpu="$fields" --format=csv,noheader,nounits ${CUDA_VISIBLE_DEVICES:+"--id=${CUDA_VISIBLE_DEVICES%%,*}"} \
        2> /dev/null | head -n 1) || gpu=""
}

status() { # how it stands
    "$python" "$here/prove_status.py" "$out" "$run" --limit "$limit" --gpu-at-start "$gpu_at_start" --gpu "$gpu" "$@" -- "${command[@]}"
}

sample
gpu_at_start=$gpu
status
begin=$SECONDS code=0
if [ -e "$run/summary.json" ]; then
    echo "complete already: nothing to run" > "$log"
else
    # --foreground: the signal goes to the trainer once; a second one would end it at once.
    left=$((limit - margin - SECONDS))
    timeout --foreground --preserve-status --signal=USR1 --kill-after=$((margin - margin / 3)) "$((left > 1 ? left : 1))" \
        "${command[@]}" < /dev/null >> "$log" 2>&1 &
    trainer=$!
    trap 'kill -TERM "$trainer" 2> /dev/null || true' TERM INT HUP
    sampled=$SECONDS
    while kill -0 "$trainer" 2> /dev/null; do
        if [ $((SECONDS - sampled)) -ge 20 ]; then
            sample
            sampled=$SECONDS
        fi
        sleep 0.3
    done
    wait "$trainer" || code=$?
    trap - TERM INT HUP
fi
took=$((SECONDS - begin))

for name in "${copied[@]}"; do
    [ ! -e "$run/$name" ] || cp "$run/$name" "$out/$name"
done
tail -n 3 "$log"
picture=()
"$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("matplotlib") is None)' || picture=(--no-picture)
[ ${#picture[@]} -eq 0 ] || echo "no curve.png: matplotlib is missing, and python tools/runs/curve.py $out draws it elsewhere" >&2
ended=0
status --exit-code "$code" --seconds "$took" || ended=$?
if [ -e "$out/metrics.jsonl" ]; then
    "$python" "$here/curve.py" "$out" --out "$out/curve" --labels "$(basename "$run")" ${picture[@]+"${picture[@]}"} || true
fi
exit "$ended"
