#!/usr/bin/env bash
# `megatron-mup sweep run` on many machines: an array of jobs, and a last one that writes the report.
#
#   TASKS=8 bash launch/sweep.sh CONFIG OUT [options of `megatron-mup sweep run`]
#
# submits four jobs, each after the one before: a small one that checks everything and makes the
# shards; an array of TASKS (4), each of which runs its share of the sweep; the array once more, for
# further seeds, which need the first seed's losses, and for what was lost; and a small one that
# makes OUT/runs.csv and OUT/report, and fails where runs are missing. From the environment: TASKS;
# AT_ONCE, tasks at a time (all); TASK_OPTIONS, options of sbatch for the tasks, e.g. '--gpus=1
# --time=08:00:00'; MAX_RESTARTS (3) after a time limit. The tasks run the sweep that the check has
# read: CONFIG may change meanwhile. Where there is no sbatch, the sweep runs on this machine.
#
#SBATCH --job-name=sweep
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=4
#SBATCH --mem-per-cpu=4G
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
#SBATCH --output=slurm-%x-%j.out
set -euo pipefail

# Slurm runs a copy from its spool; the job's record tells where the script was.
here=$(dirname "$(realpath "$0")")
if [[ ! -e $here/run_functions.sh ]]; then
    here=$(scontrol show job "${SLURM_JOB_ID:-none}") || true
    here=${here#*Command=}
    here=${here%%/sweep.sh*}
fi
[[ -e $here/run_functions.sh ]] || {
    echo "error: run_functions.sh is not found; keep this script's name and folder, sweep.sh" >&2
    exit 2
}
# shellcheck source=launch/run_functions.sh
source "$here/run_functions.sh"

# Submit this script: submit_part NAME DEPENDENCY OPTION ... -- ARGUMENT ...; prints the job's number.
submit_part() {
    local name=$1 dependency=$2 options=() job
    shift 2
    while [[ $1 != -- ]]; do
        options+=("$1")
        shift
    done
    # What the job waits for cannot come any more once a check has failed.
    [[ -z $dependency ]] || options+=("--dependency=$dependency" --kill-on-invalid-dep=yes)
    job=$(sbatch --parsable --export=ALL --job-name="sweep-$name" "${SITE_OPTIONS[@]}" \
        "${options[@]}" "$here/sweep.sh" "$name" "${@:2}") || return
    echo "${job%%;*}"
}

# Submit all jobs of a sweep.
submit_sweep() {
    local options=() array=() jobs=() job
    [[ $TASKS =~ ^[1-9][0-9]{0,4}$ ]] || fail "TASKS is $TASKS; set the number of tasks, e.g. TASKS=8"
    read -r -a options <<<"${TASK_OPTIONS:-}"
    array=("${options[@]}" "--array=0-$((TASKS - 1))${AT_ONCE:+%$AT_ONCE}" --output=slurm-%x-%A_%a.out)
    # As a job, this script must not limit the jobs that it submits by what it got itself.
    unset SLURM_MEM_PER_CPU SLURM_MEM_PER_NODE SLURM_NTASKS_PER_NODE SLURM_CPUS_PER_TASK
    job=$(submit_part check '' -- "$@") || refused
    jobs+=("$job")
    job=$(submit_part task "afterok:${jobs[0]}" "${array[@]}" -- "$@") || refused "${jobs[@]}"
    jobs+=("$job")
    job=$(submit_part task "afterok:${jobs[0]},afterany:$job" "${array[@]}" -- "$@") ||
        refused "${jobs[@]}"
    jobs+=("$job")
    job=$(submit_part report "afterok:${jobs[0]},afterany:$job" -- "$@") || refused "${jobs[@]}"
    jobs+=("$job")
    printf '%s\n' "check:  job ${jobs[0]}" "runs:   job ${jobs[1]}, $TASKS tasks" \
        "again:  job ${jobs[2]}, for further seeds and what was lost" \
        "report: job ${jobs[3]}, in $2/report"
}

# End after sbatch said no: refused JOB ..., those that it took before.
refused() {
    (($# == 0)) || scancel "$@"
    fail "sbatch refused a job (see above); nothing of this sweep stays submitted. Most tasks of an" \
        "array: MaxArraySize of \`scontrol show config\`; TASKS is $TASKS"
}

# Run one task's share. Before the time limit it saves, and the job goes back into the queue.
run_task() {
    VARIABLES=()
    listen
    # As the check has read it: CONFIG may have been edited since.
    watch USR1 "${COMMAND[@]}" sweep run "$2/sweep.yaml" --out "$2" "${@:3}" \
        --task "$((SLURM_ARRAY_TASK_ID + 1))/$SLURM_ARRAY_TASK_COUNT"
    if [[ $signalled == USR1 ]] && ((code == 75)); then
        if ((${SLURM_RESTART_COUNT:-0} < ${MAX_RESTARTS:-3})); then
            requeue_job ''
        else
            echo "not requeued: MAX_RESTARTS is ${MAX_RESTARTS:-3}; the same command goes on" >&2
        fi
    fi
    exit "$code"
}

# Sets KEPT to those of a command's arguments that are one option: keep_option NAME ARGUMENT ...
keep_option() {
    local name=$1
    KEPT=()
    shift
    while (($#)); do
        case $1 in
            "$name") KEPT+=("$1" "${2:-}") && shift ;;
            "$name"=*) KEPT+=("$1") ;;
        esac
        shift
    done
}

# Check the sweep and make its shards.
check_sweep() {
    keep_option --text "${@:3}"
    exec "${COMMAND[@]}" sweep prepare "$1" --out "$2" "${KEPT[@]}"
}

# One table of those of all tasks, and the report; fails where runs are missing.
report_sweep() {
    local lacking=0
    keep_option --only "${@:3}"
    "${COMMAND[@]}" sweep merge "$2" "${KEPT[@]}" || lacking=$?
    ((lacking < 2)) || exit "$lacking"
    "${COMMAND[@]}" sweep report "$2"
    exit "$lacking"
}

if [[ " $* " == *" --help "* ]]; then
    print_help "$0"
    exit
fi
if (($# == 0)); then
    print_help "$0" >&2
    exit 2
fi
TASKS=${TASKS:-4}
part=here
if in_job && [[ $1 == check || $1 == task || $1 == report ]]; then
    part=$1
    shift
elif type -P sbatch >/dev/null; then
    part=submit
fi
(($# >= 2)) || fail "give the sweep's YAML and a folder: bash launch/sweep.sh CONFIG OUT"
[[ $2 != -* ]] || fail "the second argument is $2; give the folder of the sweep, then options"
[[ -e $1 ]] || fail "there is no configuration $1"
[[ " ${*:3}" != *" --task"* ]] || fail "this script gives --task to each job; leave it out, set TASKS"
check_limits "$@"
load_site "$([[ $part != submit ]] || echo submit)"
case $part in
    submit) submit_sweep "$(realpath "$1")" "$(realpath --canonicalize-missing "$2")" "${@:3}" ;;
    check) check_sweep "$@" ;;
    task) run_task "$@" ;;
    report) report_sweep "$@" ;;
    here)
        code=0
        "${COMMAND[@]}" sweep run "$1" --out "$2" "${@:3}" || code=$?
        # 1: some runs failed; the rest is worth a report.
        ((code < 2)) || exit "$code"
        "${COMMAND[@]}" sweep report "$2"
        exit "$code"
        ;;
esac
