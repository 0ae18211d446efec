#!/usr/bin/env bash
# All that a GPU can say of the kernels, in one command and under ten minutes:  tools/profile/kernels_gpu.sh OUT_DIR
#
# Every test natively and in CUDA graphs, every operation against its reference and the library, the compile table, and the tiles of
# the convolution against cuDNN. Each step writes its text and its JSON or XML to OUT_DIR and has a time limit; a failing step does not
# stop the others. Needs what `pip install -e '.[test]'` installs. Exits with the number of steps that failed.
set -u
if [ $# -ne 1 ]; then
    echo "usage: $0 OUT_DIR" >&2
    exit 2
fi
mkdir -p "$1" && out=$(cd "$1" && pwd) || exit 2
cd "$(dirname "$0")/../.." || exit 2
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}"
unset TRITON_INTERPRET
python -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || { echo "error: PyTorch finds no CUDA device" >&2; exit 2; }
nvidia-smi > "$out/nvidia-smi.txt" 2>&1
failed=0

step() { # name, seconds, command...
    local name=$1 limit=$2
    shift 2
    local begin=$SECONDS
    timeout "$limit" "$@" > "$out/$name.txt" 2>&1
    local status=$?
    echo "$name: $([ $status -eq 0 ] && echo passed || echo "FAILED ($status)") in $((SECONDS - begin)) s"
    [ $status -eq 0 ] || failed=$((failed + 1))
}

# What is most wanted comes first, should the time run out. Tests share the card: most of their time goes to compiling.
step bench 150 python -m pytest tests/bench -n 0 -q --benchmark-json="$out/bench.json"
step graphs 90 python -m pytest tests/gpu -n 0 -q --junitxml="$out/graphs.xml"
step parity 210 python -m pytest tests/kernels -n "${JOBS:-8}" -q --junitxml="$out/parity.xml"
step tiles 60 python -m tools.profile.conv_tiles --json "$out/tiles.json"
step compile 80 python -m tools.profile.compile_table --jobs "${JOBS:-8}" --json "$out/compile.json"
exit $failed
