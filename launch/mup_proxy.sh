#!/usr/bin/env bash
# A proxy of the 10B run: its depth, batch, length and rules at a width from 128 to 4096, in bf16.
#
#   LR=0.01 bash launch/mup_proxy.sh WIDTH [key=value ...]   # submits itself with nodes for the width
#   LR=0.01 sbatch --nodes=2 launch/mup_proxy.sh WIDTH [key=value ...]
#
# From the environment as in mup_10b.sh; RUN_DIR is runs/mup_proxy_WIDTH. Arguments are options of
# configs/mup_proxy.yaml. Several learning rates: lr_sweep.sh.
#
#SBATCH --job-name=mup_proxy
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out
#SBATCH --signal=B:USR1@1200
set -euo pipefail

# Slurm runs a copy from its spool; the job's record tells where the script was.
here=$(dirname "$(realpath "$0")")
if [[ ! -e $here/run_functions.sh ]]; then
    here=$(scontrol show job "${SLURM_JOB_ID:-none}") || true
    here=${here#*Command=}
    here=${here%%/mup_proxy.sh*}
fi
[[ -e $here/run_functions.sh ]] || {
    echo "error: run_functions.sh is not found; keep this script's name and folder, mup_proxy.sh" >&2
    exit 2
}
# shellcheck source=launch/run_functions.sh
source "$here/run_functions.sh"

width=${1:-}
if [[ " $* " == *" --help "* ]]; then
    print_help "$0"
    exit
fi
if [[ ! $width =~ ^[1-9][0-9]*$ ]] || ((width % 128)); then
    fail "the width is '$width'; give a multiple of 128 first, e.g. mup_proxy.sh 512"
fi
shift
SCRIPT_ARGUMENTS=("$width")
JOB_OPTIONS=(--job-name="mup_proxy_$width" --nodes="$((width > 512 ? width / 512 : 1))")
RUN_DIR=${RUN_DIR:-runs/mup_proxy_$width}
OWN_OPTIONS=("hidden_size=$width" "num_attention_heads=$((width / 128))")
run_training "$here/configs/mup_proxy.yaml" "$@"
