#!/usr/bin/env bash
# The 10B run's twin with AdamW: relative rule, no decay (`combined_no_wd` in docs/presets.md). Its
# base learning rate of 2^-6 is published; LR= takes another. The rest is as in mup_10b.sh.
#
#   sbatch launch/mup_10b_adamw.sh [key=value ...]
#
#SBATCH --job-name=mup_10b_adamw
#SBATCH --nodes=16
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out
# Twenty minutes before the limit, which is more than a hang (parallel.distributed_timeout_minutes)
# and a save take: save, and go back into the queue.
#SBATCH --signal=B:USR1@1200
set -euo pipefail

# Slurm runs a copy from its spool; the job's record tells where the script was.
here=$(dirname "$(realpath "$0")")
if [[ ! -e $here/run_functions.sh ]]; then
    here=$(scontrol show job "${SLURM_JOB_ID:-none}") || true
    here=${here#*Command=}
    here=${here%%/mup_10b_adamw.sh*}
fi
[[ -e $here/run_functions.sh ]] || {
    echo "error: run_functions.sh is not found; keep this script's name and folder, mup_10b_adamw.sh" >&2
    exit 2
}
# shellcheck source=launch/run_functions.sh
source "$here/run_functions.sh"

run_training "$here/configs/mup_10b_adamw.yaml" "$@"
