#!/usr/bin/env bash
# All that a GPU can say of the kernels, in one command and under ten minutes:  tools/profile/kernels_gpu.sh OUT_DIR
#
# Every test natively and in CUDA graphs, every operation against its reference and the library, the compile table, and the tiles of
# the convolution against cuDNN. A step that fails or runs out of its time does not stop the others. OUT_DIR gets summary.txt and
# kernels.tar.gz, with the text and the JSON or XML of each step, written again after each. Needs what `pip install -e '.[test]'`
# installs. Exits with the number of steps that failed, 75 if none did and some ran out of time.
set -u
if [ $# -ne 1 ]; then
    echo "usage: $0 OUT_DIR" >&2
    exit 2
fi
mkdir -p "$1" && out=$(cd "$1" && pwd) && work=$(mktemp -d) || exit 2
trap 'rm -rf "$work"' EXIT
cd "$(dirname "$0")/../.." || exit 2
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" python=${PYTHON:-python3}
unset TRITON_INTERPRET
"$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || { echo "error: PyTorch finds no CUDA device" >&2; exit 2; }
nvidia-smi > "$work/nvidia-smi.txt" 2>&1
: > "$out/summary.txt"
failed=0 late=0

step() { # name, seconds, arguments of python...
    local name=$1 limit=$2 begin=$SECONDS status=0 how=passed
    shift 2
    timeout "$limit" "$python" "$@" > "$work/$name.txt" 2>&1 || status=$?
    case $status in
        0) ;;
        124) how="out of time" late=$((late + 1)) ;;
        *) how="FAILED ($status)" failed=$((failed + 1)) ;;
    esac
    echo "$name: $how in $((SECONDS - begin)) s; $(tail -n 1 "$work/$name.txt")" | tee -a "$out/summary.txt"
    "$python" -m tools.profile.bring_home "$work" "$out/kernels.tar.gz"
}

# What is most wanted comes first, should the time run out. Tests share the card: most of their time goes to compiling.
step bench 150 -m pytest tests/bench -n 0 -q --benchmark-json="$work/bench.json"
step graphs 90 -m pytest tests/gpu -n 0 -q --junitxml="$work/graphs.xml"
step parity 200 -m pytest tests/kernels -n "${JOBS:-8}" -q --junitxml="$work/parity.xml"
step tiles 60 -m tools.profile.conv_tiles --json "$work/tiles.json"
step compile 80 -m tools.profile.compile_table --jobs "${JOBS:-8}" --json "$work/compile.json"
exit $((failed ? failed : late ? 75 : 0))
