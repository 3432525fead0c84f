#!/usr/bin/env bash
# Stands in for megatron-mup in tests of the launch scripts. Notes each call, obeys the file
# `trouble`, then runs the real command; `train` and `launch preflight`, where the test says so, are
# acted here, because torch does not fit 128 times into a test machine.
# Reads from its own folder: `settings` (real, trainer, acted, PYTHONPATH) and `trouble`, lines of
# bash that may use rank, node, start and the arguments. Writes `calls`, `environments/` and `ended/`.
# `record.json` is what checkpoints keep.
set -euo pipefail

here=$(dirname "${BASH_SOURCE[0]}")
real=() trainer=() acted=''
# shellcheck source=/dev/null
source "$here/settings"
rank=${RANK:-${SLURM_PROCID:-0}}
node=${SLURMD_NODENAME:-none}
start=${SLURM_JOB_ID:-0}.${SLURM_RESTART_COUNT:-0}
command="$1 $2"
[[ $1 == launch ]] || command=$1
# One short line a call: ranks on all nodes append to the same file.
printf '%s\n' "$start $node $rank $command" >>"$here/calls"
# shellcheck source=/dev/null
if [[ -e $here/trouble ]]; then source "$here/trouble"; fi

# Wait as a rank does in a collective, for the first rank to end; then end with its code.
follow() {
    local silence
    # A signal's default would end this rank before the first one has saved.
    trap : USR1 TERM
    # Read from a pipe that nobody writes: waits without a process of its own.
    exec {silence}<> <(:)
    until [[ -e $here/ended/$start ]]; do
        read -r -t 0.3 -u "$silence" || true
    done
    exit "$(<"$here/ended/$start")"
}

# The rank's environment, for the test to check.
note_environment() {
    local name="$start.${command// /-}.$rank"
    env -0 >"$here/environments/.$name"
    mv "$here/environments/.$name" "$here/environments/$name"
}

case " $acted " in
    *" ${command// /-} "*) ;;
    *) exec "${real[@]}" "$@" ;;
esac
note_environment
case $command in
    train)
        [[ $rank == 0 ]] || follow
        exec "${trainer[@]}" --ended "$here/ended/$start" --record "$here/record.json" "${@:2}"
        ;;
    "launch preflight")
        [[ $3 == --run-dir ]]
        # The report of a rank that found nothing wrong.
        reports=$(printf '%s/launch/preflight/%04d' "$4" "$MEGATRON_MUP_ATTEMPT")
        printf '{"rank": %d, "local_rank": %d, "node": "%s", "stage": 3, "failures": {}, %s}' \
            "$rank" "${LOCAL_RANK:-${SLURM_LOCALID:-0}}" "$node" \
            '"versions": {}, "data": null, "device": null, "notes": {}' \
            >"$(printf '%s/rank-%05d.json' "$reports" "$rank")"
        ;;
    *)
        echo "$command has no stand-in" >&2
        exit 1
        ;;
esac
