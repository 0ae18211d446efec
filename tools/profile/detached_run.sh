#!/usr/bin/env bash
# A training run that goes on between the calls of one GPU lease; the same command starts, polls and resumes it:
#
#   tools/profile/detached_run.sh RUN_DIR SECONDS -- ARGS of python3 -m speedyzero, without --run-dir
#   OUT=out tools/profile/detached_run.sh runs/pong0 540 -- --env Pong-v5 --preset efficientzero --seed 0
#
# Starts the run in a session of its own, its output in RUN_DIR.log, with --watchdog 90 unless ARGS have one: a lease is too short to
# wait longer for an iteration that is stuck. Resumes it if its process is gone and there is no summary.json.
# Waits at most SECONDS for its end, copies its rows, settings, scores, log and learning curve to $OUT (default: RUN_DIR.out), at most
# seven files that replace those of the call before, and says how it stands. Exit code: 0 complete, 75 it goes on, 1 it died: see the
# log; the next call resumes it. To stop it, `kill -TERM $(cat RUN_DIR.pid)`: it saves first.
set -euo pipefail
[[ $# -ge 3 && $3 == -- ]] || { echo "usage: detached_run.sh RUN_DIR SECONDS -- ARGS of python -m speedyzero" >&2; exit 2; }
root=$(cd "$(dirname "$0")/../.." && pwd) run=$1 end=$((SECONDS + $2)) python=${PYTHON:-python3}
shift 3
mkdir -p "$(dirname "$run")" "${OUT:=$run.out}"
export PYTHONPATH="$root:$root/kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

# A number in the file may by now be another process: only one that has RUN_DIR on its command line counts.
alive() { [ -s "$run.pid" ] && tr '\0' '\n' 2> /dev/null < "/proc/$(cat "$run.pid")/cmdline" | grep -qxF -- "$run"; }

if ! alive && [ ! -e "$run/summary.json" ]; then
    [[ " $*" == *" --watchdog"* ]] || set -- "$@" --watchdog 90
    [ ! -e "$run/config.json" ] || set -- "$@" --resume
    setsid "$python" -m speedyzero "$@" --run-dir "$run" < /dev/null >> "$run.log" 2>&1 &
    echo $! > "$run.pid"
fi
while alive && [ $SECONDS -lt "$end" ]; do sleep 1; done
for file in "$run"/{metrics.jsonl,config.json,eval.json,summary.json} "$run.log"; do [ ! -e "$file" ] || cp "$file" "$OUT/"; done
"$python" -m tools.curve "$run" --out "$OUT/curve" || true  # there may be no row yet, or no matplotlib
tail -n 1 "$run.log" || true
if [ -e "$run/summary.json" ]; then echo complete; elif alive; then echo "goes on"; exit 75; else echo "died"; exit 1; fi
