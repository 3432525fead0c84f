#!/usr/bin/env bash
# One launch script at several learning rates: an array of jobs, and a last one that makes a table.
#
#   RATES='0.004 0.008 0.016' bash launch/lr_sweep.sh launch/mup_proxy.sh 512 [key=value ...]
#
# The runs are in RUN_DIR/lr-RATE, the table in RUN_DIR/sweep.csv and sweep.md (runs/lr_sweep). From
# the environment: RATES, RUN_DIR, AT_ONCE (jobs at a time; all), and what the launch script reads.
# Where there is no sbatch, the runs follow each other on this machine.
#
#SBATCH --job-name=lr_sweep
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --time=00:10:00
# Started twice, this script would submit twice.
#SBATCH --no-requeue
#SBATCH --output=slurm-%x-%j.out
set -euo pipefail

# Slurm runs a copy from its spool; the job's record tells where the script was.
here=$(dirname "$(realpath "$0")")
if [[ ! -e $here/functions.sh ]]; then
    here=$(scontrol show job "${SLURM_JOB_ID:-none}") || true
    here=${here#*Command=}
    here=${here%%/lr_sweep.sh*}
fi
[[ -e $here/functions.sh ]] || {
    echo "error: functions.sh is not found; keep this script's name and folder, lr_sweep.sh" >&2
    exit 2
}
# shellcheck source=launch/functions.sh
source "$here/functions.sh"

# A value of the JSON of a run's status, one line each; nothing if there is none.
status_value() {
    sed -n '/^ *"'"$1"'":/{s/.*: *"\{0,1\}//;s/"\{0,1\},\{0,1\}$//;s/^null$//;p;q}' <<<"$2"
}

# Write the table of final losses: report RUN_DIR RATE ...
report() {
    local folder=$1 rate status state best
    shift
    {
        echo "lr,state,iteration,train_iters,loss,validation_loss"
        for rate in "$@"; do
            status=$("${COMMAND[@]}" status --json "$folder/lr-$rate" 2>/dev/null) || true
            state=$(status_value state "$status")
            echo "$rate,${state:-missing},$(status_value iteration "$status"),$(
                status_value train_iters "$status"),$(status_value 'lm loss' "$status"),$(
                status_value 'lm loss validation' "$status")"
        done
    } >"$folder/sweep.csv"
    sed -e 's/,/ | /g' -e 's/.*/| & |/' -e '1{p;s/[^|]\{1,\}/---/g}' "$folder/sweep.csv" \
        >"$folder/sweep.md"
    cat "$folder/sweep.md"
    best=$(awk -F, 'NR == 2 || NR > 1 && $1 + 0 < least { least = $1 + 0 }
        NR == 2 || $1 + 0 > most { most = $1 + 0 }
        $2 == "finished" { loss = $6 == "" ? $5 : $6
        if (loss != "" && (best == "" || loss + 0 < low)) { low = loss + 0; best = $1 } }
        END { if (best != "") print best, best + 0 == least || best + 0 == most ? "end" : "" }' \
        "$folder/sweep.csv")
    [[ -n $best ]] || fail "no run has finished; their logs say why"
    echo "lowest loss at ${best% *}: LR_FROM=$folder/lr-${best% *}/launch/config.yaml"
    [[ $best != *end ]] || echo "that is the end of the list: the best learning rate may lie beyond"
}

# Run or submit the launch script for all rates, and the report after them.
sweep() {
    local script=$1 rates=() rate array=''
    check_arguments "$@"
    shift
    read -r -a rates <<<"${RATES:-}"
    ((${#rates[@]})) || fail "RATES is not set; give learning rates, e.g. RATES='0.004 0.008 0.016'"
    for rate in "${rates[@]}"; do
        check_rate RATES "$rate"
    done
    [[ -e $script ]] || fail "there is no launch script $script"
    # As a job, this script is a small one: what it got must not limit the jobs that it submits.
    unset SLURM_MEM_PER_CPU SLURM_MEM_PER_NODE SLURM_NTASKS_PER_NODE SLURM_CPUS_PER_TASK
    mkdir -p "$RUN_DIR"
    if ! type -P sbatch >/dev/null; then
        for rate in "${rates[@]}"; do
            LR=$rate RUN_DIR=$RUN_DIR/lr-$rate bash "$script" "$@" ||
                echo "the run at $rate failed" >&2
        done
        report "$RUN_DIR" "${rates[@]}"
        return
    fi
    array=$(env --unset=SLURM_JOB_ID SUBMIT=yes SWEEP_RATES="${rates[*]}" RUN_DIR="$RUN_DIR" \
        SBATCH_ARRAY_INX="0-$((${#rates[@]} - 1))${AT_ONCE:+%$AT_ONCE}" bash "$script" "$@")
    array=${array##* }
    sbatch --export=ALL --dependency="afterany:$array" --job-name=lr_sweep_report "${SITE_OPTIONS[@]}" \
        "$here/lr_sweep.sh" report "$RUN_DIR" "${rates[@]}"
    echo "runs: job $array, ${#rates[@]} tasks, in $RUN_DIR"
}

if [[ $# == 0 || " $* " == *" --help "* ]]; then
    print_help "$0"
    exit
fi
RUN_DIR=$(realpath --canonicalize-missing "${RUN_DIR:-runs/lr_sweep}")
if [[ $1 == report ]]; then
    load_site
    report "${@:2}"
else
    check_run_dir
    load_site "$(! type -P sbatch >/dev/null || echo submit)"
    sweep "$@"
fi
