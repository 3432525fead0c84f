# shellcheck shell=bash
# A training run from the check to the restart: `run_training CONFIG [key=value ...]`, called by a
# launch script that was started by sbatch, or by bash; docs/slurm.md tells it for users. A script may
# set OWN_OPTIONS (of the configuration, before the user's), JOB_OPTIONS (of sbatch, where it submits
# itself) and SCRIPT_ARGUMENTS (its own, before key=value). From the environment:
#   RUN_DIR            folder of the run (runs/NAME OF THE CONFIGURATION)
#   LR, LR_FROM        peak learning rate, or a file that has it
#   MAX_RESTARTS       restarts in a row without progress before the run is given up (3)
#   EXCLUDE_AFTER      failures after which a node is excluded (unset: never)
#   LAUNCHER           srun (in a job) or torchrun; outside of a job torchrun is the only one
#   GPUS_PER_NODE      processes of a node (the job's tasks of a node; outside of a job all GPUs)
#   PREFLIGHT_SECONDS  longest wait for the nodes' checks (300); 0 leaves them out
#   CONTROLLER_SECONDS between two tries to reach Slurm's controller at a requeue (30)

# shellcheck source=launch/functions.sh
source "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/functions.sh"
# shellcheck source=launch/step_functions.sh
source "$project/launch/step_functions.sh"

run_training() {
    local name config=$1
    shift
    if [[ " $* " == *" --help "* ]]; then
        print_help "$0"
        exit
    fi
    name=$(basename "$config" .yaml)
    [[ -e $config ]] || fail "there is no configuration $config"
    if is_to_be_submitted; then
        submit_itself "$config" "$@"
        return
    fi
    load_site
    check_limits "$@"
    RUN_DIR=$(realpath --canonicalize-missing "${RUN_DIR:-runs/$name}")
    settle_processes
    take_rate_of_sweep
    listen
    while true; do
        run_attempt "$config" "$@"
        restart_or_end
    done
}

# Whether the calling script is to submit itself: bash started it, where Slurm is.
is_to_be_submitted() {
    ! in_job && type -P sbatch >/dev/null && [[ -n ${SUBMIT:-} || -z ${LAUNCHER:-} ]]
}

# Submit the calling script.
submit_itself() {
    local config=$1
    shift
    load_site submit
    check_limits "$@"
    if [[ -z ${LR:-}${LR_FROM:-}${SWEEP_RATES:-} && " $*" != *" lr="* && " $*" != *" optimizer.lr="* ]]; then
        grep --quiet '^  lr:' "$config" ||
            fail "no learning rate is given; set LR=number or LR_FROM=file (see docs/mup_10b.md)"
    fi
    # --export: the environment has the run's settings, whatever SBATCH_EXPORT says.
    SUBMIT='' sbatch --export=ALL ${SWEEP_RATES:+"--comment=lr_sweep"} \
        ${JOB_OPTIONS[@]+"${JOB_OPTIONS[@]}"} "${SITE_OPTIONS[@]}" \
        "$(realpath "$0")" ${SCRIPT_ARGUMENTS[@]+"${SCRIPT_ARGUMENTS[@]}"} "$@"
}

# Refuse now what would end the run later, or after training only: check_limits ARGUMENT ...
check_limits() {
    local number='^(0|[1-9][0-9]{0,8})$'
    check_arguments "$@"
    check_run_dir
    [[ -z ${LR:-} ]] || check_rate LR "$LR"
    [[ ${MAX_RESTARTS:-3} =~ $number ]] ||
        fail "MAX_RESTARTS is $MAX_RESTARTS; set a number of restarts, e.g. MAX_RESTARTS=3"
    [[ ${EXCLUDE_AFTER:-1} =~ $number && ${EXCLUDE_AFTER:-1} != 0 ]] ||
        fail "EXCLUDE_AFTER is $EXCLUDE_AFTER; set 1 or more failures, or unset it to exclude no node"
    [[ ${PREFLIGHT_SECONDS:-300} =~ $number ]] ||
        fail "PREFLIGHT_SECONDS is $PREFLIGHT_SECONDS; set whole seconds, or 0 for no checks"
    [[ ${CONTROLLER_SECONDS:-30} =~ $number ]] ||
        fail "CONTROLLER_SECONDS is $CONTROLLER_SECONDS; set whole seconds"
}

# Sets LAUNCHER, NODES (names, with commas between), NODE_COUNT, PER_NODE, CPUS and ports.
settle_processes() {
    local default_launcher=torchrun tasks=1
    NODES=$(uname -n) NODE_COUNT=1 PORT=29500 CPUS=''
    if in_job; then
        default_launcher=srun
        NODES=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd,)
        NODE_COUNT=$SLURM_JOB_NUM_NODES
        tasks=${SLURM_NTASKS_PER_NODE:-1}
        # Below the ports that Linux gives to outgoing connections; the next one is the preflight's.
        # Another one at each restart, should one be taken.
        PORT=$((10000 + 2 * ((SLURM_JOB_ID + 101 * ${SLURM_RESTART_COUNT:-0}) % 10000)))
        check_address
    elif type -P nvidia-smi >/dev/null; then
        tasks=$(nvidia-smi --list-gpus | wc -l)
    fi
    LAUNCHER=${LAUNCHER:-$default_launcher}
    PER_NODE=${GPUS_PER_NODE:-$tasks}
    [[ $PER_NODE =~ ^[1-9][0-9]*$ ]] ||
        fail "GPUS_PER_NODE is $PER_NODE; set the number of processes of a node, e.g. GPUS_PER_NODE=8"
    if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then
        CPUS=$((SLURM_CPUS_PER_TASK * tasks / PER_NODE))
        ((CPUS)) || CPUS=1
        export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$CPUS}
    fi
    case $LAUNCHER in
        srun) in_job || fail "LAUNCHER=srun needs a Slurm job; use sbatch, or LAUNCHER=torchrun" ;;
        torchrun) find_torchrun ;;
        *) fail "LAUNCHER is $LAUNCHER; set srun or torchrun" ;;
    esac
}

# Ranks meet on the machine that calls srun; in an interactive allocation it may not be a node of it.
check_address() {
    local host
    ! in_batch_script && [[ -z ${MASTER_ADDR:-} ]] || return 0
    host=$(uname -n)
    for host in "$host" "${host%%.*}" "${SLURMD_NODENAME:-}"; do
        [[ ,$NODES, != *",$host,"* ]] || return 0
    done
    fail "$(uname -n) is not one of this allocation's nodes ($NODES), so the ranks cannot meet here;" \
        "submit the script by sbatch, or set MASTER_ADDR=${NODES%%,*} in launch/env"
}

# Sets AGENT, the command line of torchrun, which lies beside megatron-mup if TORCHRUN is not set.
find_torchrun() {
    local last=${RANK_COMMAND[-1]}
    if [[ -n ${TORCHRUN:-} ]]; then
        AGENT=("${TORCHRUN[@]}")
        return
    fi
    [[ $last == *megatron-mup ]] ||
        fail "where torchrun is cannot be told from MEGATRON_MUP; set TORCHRUN in launch/env"
    AGENT=("${RANK_COMMAND[@]:0:${#RANK_COMMAND[@]}-1}" "${last%megatron-mup}torchrun")
}

# A task of lr_sweep.sh takes its learning rate from the list, and a folder of its own.
take_rate_of_sweep() {
    local rates
    if [[ -z ${SWEEP_RATES:-} ]]; then
        # Already taken, or an array of the user's own, unless its record says otherwise.
        [[ -n ${SLURM_ARRAY_TASK_ID:-} && -z ${SWEEP_RATES+taken} ]] || return 0
        [[ $(scontrol show job "$(own_job)") != *Comment=lr_sweep* ]] ||
            fail "the learning rates of lr_sweep.sh did not reach this job: leave --export out of" \
                "SITE_OPTIONS, and sweep again"
        return 0
    fi
    read -r -a rates <<<"$SWEEP_RATES"
    LR=${rates[$SLURM_ARRAY_TASK_ID]}
    RUN_DIR=$RUN_DIR/lr-$LR
    SWEEP_RATES=''
}

# The job's name for scontrol: of an array, this task alone.
own_job() {
    if [[ -n ${SLURM_ARRAY_JOB_ID:-} ]]; then
        echo "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
    else
        echo "$SLURM_JOB_ID"
    fi
}

# Check all nodes; sets `code` to that of the judge.
check_nodes() {
    PREFLIGHT_SECONDS=${PREFLIGHT_SECONDS:-300}
    ((PREFLIGHT_SECONDS)) || return 0
    on_all_ranks TERM "$((PORT + 1))" --kill-on-bad-exit=0 -- launch preflight \
        --run-dir "$RUN_DIR" --timeout-seconds "$((PREFLIGHT_SECONDS * 4 / 5))"
    [[ -z $signalled ]] || return 0
    code=0
    env "${VARIABLES[@]}" "${COMMAND[@]}" launch judge --run-dir "$RUN_DIR" --nodes "$NODES" \
        --tasks-per-node "$PER_NODE" || code=$?
}

# Check, train once, and set `code` and `decision`, what is to follow. VARIABLES are this attempt's.
run_attempt() {
    local config=$1 lines
    shift
    code=0
    lines=$("${COMMAND[@]}" launch begin --run-dir "$RUN_DIR" --config "$config" \
        --world-size "$((NODE_COUNT * PER_NODE))" ${LR:+--lr "$LR"} ${LR_FROM:+--lr-from "$LR_FROM"} \
        ${SLURM_JOB_ID:+--attempt-of "$SLURM_JOB_ID:${SLURM_RESTART_COUNT:-0}"} \
        --max-restarts "${MAX_RESTARTS:-3}" \
        "checkpoint.save=\"$RUN_DIR/checkpoints\"" "checkpoint.load=\"$RUN_DIR/checkpoints\"" \
        "logging.metrics_path=\"$RUN_DIR/metrics.jsonl\"" \
        ${OWN_OPTIONS[@]+"${OWN_OPTIONS[@]}"} "$@") || exit
    mapfile -t VARIABLES <<<"$lines"
    check_nodes
    if [[ -n $signalled ]]; then
        code=75
    elif ((code == 0)); then
        # At a clean stop the first rank to leave must not end the others at once, which may still
        # finish their records; those that hang after a lost one are ended.
        on_all_ranks USR1 "$PORT" --kill-on-bad-exit=0 --wait=120 -- \
            train --config "$RUN_DIR/launch/config.yaml"
    fi
    decision=$(env "${VARIABLES[@]}" "${COMMAND[@]}" launch decide --run-dir "$RUN_DIR" --exit-code "$code" \
        ${signalled:+--signalled} --max-restarts "${MAX_RESTARTS:-3}" \
        ${EXCLUDE_AFTER:+--exclude-after "$EXCLUDE_AFTER"}) || exit
    echo "$decision"
}

# End this script, or return for another attempt.
restart_or_end() {
    local word nodes='' rest
    read -r word rest <<<"$decision"
    # The code that the notes of the ranks tell, which is not always that of the step.
    [[ ! $rest =~ (^|\ )exit\ ([0-9]+): ]] || code=${BASH_REMATCH[2]}
    case $word in
        finished)
            "${COMMAND[@]}" status "$RUN_DIR" || true
            exit 0
            ;;
        requeue) ;;
        resubmit) nodes=${rest%% *} ;;
        *) exit $((code ? code : 1)) ;;
    esac
    if in_batch_script; then
        requeue_job "$nodes"
        exit "$code"
    fi
    if [[ -n $signalled ]]; then
        echo "stopped by SIG$signalled; the same command continues the run" >&2
        exit "$code"
    fi
}

# Put this job back into the queue, and wait for Slurm to end this script. First argument: nodes
# that the job shall not get again; a running job's list cannot be changed, that of a pending one can.
requeue_job() {
    local job record answer try excluded=$1
    job=$(own_job)
    for try in {1..10}; do
        if record=$(scontrol show job "$job"); then
            # A job that was cancelled must not come back; one that Slurm requeued itself is pending.
            if [[ $record != *"JobState=RUNNING"* ]]; then
                record=${record#*JobState=}
                echo "not requeued: the job is ${record%%[[:space:]]*}" >&2
                return
            fi
            signalled=''
            ! answer=$(trap '' TERM && scontrol requeue "$job" 2>&1) || break
            echo "$answer" >&2
            [[ ! ${answer,,} =~ disabled|denied ]] || return 0
        fi
        if ((try == 10)); then
            echo "not requeued: Slurm's controller did not do it; submit the run again" >&2
            return
        fi
        pause "${CONTROLLER_SECONDS:-30}"
    done
    if [[ -n $excluded ]]; then
        record=${record#*ExcNodeList=}
        record=${record%%[[:space:]]*}
        [[ $record == '(null)' ]] || excluded+=,$record
        (trap '' TERM && scontrol update "JobId=$job" "ExcNodeList=$excluded") ||
            echo "warning: $1 could not be excluded" >&2
    fi
    # By seconds: a signal that comes between the question and the pause would be slept over.
    for try in {1..60}; do
        [[ -z $signalled ]] || return 0
        pause 1
    done
}

# Wait for some seconds, or until a signal.
pause() {
    sleep "$1" &
    wait $! || kill $! 2>/dev/null || true
}
