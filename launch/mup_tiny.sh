#!/usr/bin/env bash
# A tiny model on two CPU nodes, in about a minute: the whole path of a large run, to try a cluster.
#
#   sbatch launch/mup_tiny.sh [key=value ...]
#   bash launch/mup_tiny.sh [key=value ...]           # on this machine, without Slurm
#
# Makes its token shards in RUN_DIR/data (runs/mup_tiny/data) from text that every machine has. From
# the environment as in mup_10b.sh; outside of a job GPUS_PER_NODE is 2, the number of processes.
# Arguments are options of configs/mup_tiny.yaml.
#
#SBATCH --job-name=mup_tiny
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=2
#SBATCH --mem-per-cpu=2G
#SBATCH --time=00:20:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out
#SBATCH --signal=B:USR1@60
set -euo pipefail

# Slurm runs a copy from its spool; the job's record tells where the script was.
here=$(dirname "$(realpath "$0")")
if [[ ! -e $here/run_functions.sh ]]; then
    here=$(scontrol show job "${SLURM_JOB_ID:-none}") || true
    here=${here#*Command=}
    here=${here%%/mup_tiny.sh*}
fi
[[ -e $here/run_functions.sh ]] || {
    echo "error: run_functions.sh is not found; keep this script's name and folder, mup_tiny.sh" >&2
    exit 2
}
# shellcheck source=launch/run_functions.sh
source "$here/run_functions.sh"

# Make corpus, tokenizer and shards, unless they are there.
make_shards() {
    local data=$1
    [[ ! -e $data/text.manifest.json ]] || return 0
    mkdir -p "$data"
    "${COMMAND[@]}" data corpus --output "$data/corpus.jsonl" --max-bytes 1000000 --overwrite
    "${COMMAND[@]}" data tokenizer --input "$data/corpus.jsonl" --model-prefix "$data/tokenizer" \
        --vocab-size 512 --overwrite
    "${COMMAND[@]}" data preprocess --input "$data/corpus.jsonl" \
        --tokenizer-model "$data/tokenizer.model" --output-prefix "$data/text" --overwrite
}

if [[ " $* " == *" --help "* ]]; then
    print_help "$0"
    exit
fi
if ! in_job && [[ -z ${SUBMIT:-} ]]; then
    LAUNCHER=${LAUNCHER:-torchrun}
    GPUS_PER_NODE=${GPUS_PER_NODE:-2}
fi
check_limits "$@"
RUN_DIR=$(realpath --canonicalize-missing "${RUN_DIR:-runs/mup_tiny}")
if ! is_to_be_submitted; then
    load_site
    take_rate_of_sweep
    make_shards "$RUN_DIR/data"
    OWN_OPTIONS=("data.train_data_path=[\"$RUN_DIR/data/text_train\"]"
        "data.valid_data_path=[\"$RUN_DIR/data/text_valid\"]")
fi
run_training "$here/configs/mup_tiny.yaml" "$@"
