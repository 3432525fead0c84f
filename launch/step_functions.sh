# shellcheck shell=bash
# One command on all ranks of a run, and the signals that come meanwhile; used by run_functions.sh.

# Hear signals: USR1 before the time limit, TERM, and Ctrl-C. `signalled` is the last one's name.
listen() {
    local name
    signalled='' step=''
    for name in USR1 TERM INT; do
        # shellcheck disable=SC2064
        trap "note_signal $name" "$name"
    done
}

# Have the ranks save and end. Torchrun would give them half a minute, so it is passed over.
note_signal() {
    local rank ranks=()
    interrupted=yes
    if [[ -n $signalled && $1 == INT && -n $step ]]; then
        kill -TERM "$step"
    fi
    signalled=$1
    [[ -n $step ]] || return 0
    if [[ $step_signal == USR1 ]] && ! in_job; then
        read -r -a ranks <"/proc/$step/task/$step/children" || true
    fi
    ((${#ranks[@]})) || kill -"$step_signal" "$step" || true
    for rank in "${ranks[@]}"; do
        # Each leads a process group of its own.
        kill -USR1 -- "-$rank" || true
    done
}

# Run a command with VARIABLES and set `code`. In the background, so that signals are heard at once;
# in a process group of its own, which Ctrl-C does not reach. First argument: the signal to end it.
watch() {
    step_signal=$1
    shift
    set -m
    env "${VARIABLES[@]}" "$@" </dev/null &
    step=$!
    set +m
    while true; do
        interrupted='' code=0
        # A signal ends `wait`, not the command.
        wait "$step" || code=$?
        [[ -n $interrupted ]] || break
    done
    # Bash 5.2 forgets the status of a command that ends at the very moment of a signal.
    ((code >= 0)) || code=255
    step=''
}

# In each rank: run a command; if it fails, leave the note of its end that megatron_mup.rank_outcomes
# reads, unless it did so itself: of a rank that is killed there is no other word.
note_failure() {
    local code=0 now rank=${RANK:-${SLURM_PROCID:-0}} note
    # A signal comes to the command as well, and must not end this shell before it.
    trap : TERM USR1 INT
    "$@" || code=$?
    if ((code)) && [[ -n ${MEGATRON_MUP_OUTCOMES:-} ]]; then
        note=$MEGATRON_MUP_OUTCOMES/rank-$(printf %05d "$rank").json
        # Bash 4.4 has no EPOCHSECONDS.
        printf -v now '%(%s)T' -1
        # noclobber: what the command wrote itself says more.
        (set -C && printf '{"rank":%d,"node":"%s","exit_code":%d,"reason":"%s","time":%d}\n' "$rank" \
            "${SLURMD_NODENAME:-$(uname -n)}" "$code" "ended with $code" "$now" >"$note") 2>/dev/null ||
            true
    fi
    exit "$code"
}

# In each task of a step: set the address of rank 0, then run the command. Torchrun reads PET_*.
with_address() {
    export MASTER_ADDR=${MASTER_ADDR:-${SLURM_LAUNCH_NODE_IPADDR:-127.0.0.1}}
    export PET_MASTER_ADDR=$MASTER_ADDR PET_NODE_RANK=${SLURM_NODEID:-0}
    "$@"
}

# Run megatron-mup on all ranks and set `code`, that of the step: srun's is the largest of all ranks',
# torchrun's is 1. In training, which USR1 ends, ranks leave notes.
#   on_all_ranks SIGNAL PORT [option of srun ...] -- [argument of megatron-mup ...]
on_all_ranks() {
    local signal=$1 options=() command tasks=$PER_NODE prologue meeting=(--standalone)
    export MASTER_PORT=$2
    shift 2
    while [[ $1 != -- ]]; do
        options+=("$1")
        shift
    done
    shift
    prologue=$(declare -f with_address note_failure)
    command=("${RANK_COMMAND[@]}" "$@")
    [[ $signal != USR1 ]] || command=(note_failure "${command[@]}")
    if [[ $LAUNCHER == torchrun ]]; then
        tasks=1
        ((NODE_COUNT == 1)) || meeting=(--nnodes "$NODE_COUNT" --master-port "$MASTER_PORT")
        command=("${AGENT[@]}" "${meeting[@]}" --nproc-per-node "$PER_NODE" --no-python
            bash -c "$prologue; \"\$@\"" rank "${command[@]}")
        # A signal goes to all processes of a step: to the ranks, and to torchrun, which would end.
        prologue+="; trap '' USR1"
    fi
    if in_job; then
        command=(srun --export=ALL --nodes="$NODE_COUNT" --ntasks-per-node="$tasks" --label
            ${CPUS:+"--cpus-per-task=$((CPUS * PER_NODE / tasks))"} "${options[@]}"
            "${CONTAINER[@]}" bash -c "$prologue; with_address \"\$@\"" step "${command[@]}")
    fi
    [[ $signal != TERM ]] || command=(timeout --kill-after=30 "$PREFLIGHT_SECONDS" "${command[@]}")
    watch "$signal" "${command[@]}"
}
