#!/usr/bin/env bash
# Runs the unit and dist levels of the tests, the gpu level where there is a GPU, the slurm level
# where Slurm is installed and the browser level where Chromium is. Arguments go to pytest; a `-m` among
# them replaces this choice of levels. WORKERS is the number of processes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# One thread per process: the tests themselves run in parallel. Compiling with dynamo takes longer
# than any test, and a test must not reach for a display or a tracking server.
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TORCHDYNAMO_DISABLE=1 MPLBACKEND=Agg WANDB_MODE=offline

levels="not slow"
if ! missing=$(tools/find_slurm.sh 2>&1); then
    levels+=" and not slurm"
    [[ " $* " == *" -m "* ]] || echo "left out: tests of the level slurm. $missing" >&2
fi
if ! missing=$(tools/find_chromium.sh 2>&1 >/dev/null); then
    levels+=" and not browser"
    [[ " $* " == *" -m "* ]] || echo "left out: tests of the level browser. $missing" >&2
fi
if ! nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then
    levels+=" and not gpu"
fi
# By file, because the tests of a file share what it has spawned.
exec .venv/bin/python -m pytest -n "${WORKERS:-2}" --dist loadfile -m "$levels" "$@"
