# shellcheck shell=bash
# What all launch scripts share. Sets `project`, the folder of this checkout.

project=$(dirname "$(dirname "$(realpath "${BASH_SOURCE[0]}")")")

# End with a message on standard error, as megatron-mup does at a mistake of the user's.
fail() {
    echo "error: $*" >&2
    exit 2
}

# Print the comment at the top of a script.
print_help() {
    sed -e 1d -e '/^#SBATCH/,$d' -e 's/^# \{0,1\}//' "$1"
}

# Whether this is a Slurm job, and whether this is its batch script.
in_job() { [[ -n ${SLURM_JOB_ID:-} ]]; }
in_batch_script() { in_job && [[ ${ENVIRONMENT:-} == BATCH ]]; }

# Read the site's settings, if there are any, and find the command. Sets
#   SITE_OPTIONS  options for sbatch
#   CONTAINER     options with which srun starts a container (pyxis); empty without one
#   RANK_COMMAND  the command line that runs megatron-mup in a rank: MEGATRON_MUP, or one it finds
#   COMMAND       the same for one process beside this script, inside of the container
load_site() {
    SITE_OPTIONS=()
    CONTAINER=()
    # Left in the shell of a user, these would tell every rank the same place.
    unset MASTER_ADDR MASTER_PORT RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_RANK
    if [[ -e $project/launch/env ]]; then
        # Modules and conda read variables that are not set.
        set +u
        # shellcheck source=launch/env.example
        source "$project/launch/env"
        set -u
    fi
    if [[ -z ${MEGATRON_MUP:-} ]]; then
        MEGATRON_MUP=megatron-mup
        if ((${#CONTAINER[@]} == 0)) && [[ -x $project/.venv/bin/megatron-mup ]]; then
            MEGATRON_MUP=$project/.venv/bin/megatron-mup
        fi
    fi
    # Not assigned to itself: bash would no longer export what came from the environment.
    RANK_COMMAND=("${MEGATRON_MUP[@]}")
    COMMAND=("${RANK_COMMAND[@]}")
    if ((${#CONTAINER[@]})); then
        COMMAND=(srun --nodes=1 --ntasks=1 --overlap
            ${SLURMD_NODENAME:+"--nodelist=$SLURMD_NODENAME"}
            ${SLURM_CPUS_PER_TASK:+"--cpus-per-task=$SLURM_CPUS_PER_TASK"}
            "${CONTAINER[@]}" "${RANK_COMMAND[@]}")
    fi
    type -P "${COMMAND[0]}" >/dev/null || fail "the command ${COMMAND[0]} is not there:" \
        "run \`make venv\` in $project, or set MEGATRON_MUP in launch/env (see launch/env.example)"
}

# Print the sbatch options, one a line, that give another job what this batch job got.
own_resources() {
    local limit
    limit=$(squeue --noheader --job "$SLURM_JOB_ID" --format=%l)
    printf '%s\n' "--partition=$SLURM_JOB_PARTITION" "--time=$limit" \
        ${SLURM_JOB_ACCOUNT:+"--account=$SLURM_JOB_ACCOUNT"} \
        ${SLURM_JOB_QOS:+"--qos=$SLURM_JOB_QOS"} \
        ${SLURM_CPUS_PER_TASK:+"--cpus-per-task=$SLURM_CPUS_PER_TASK"} \
        ${SLURM_MEM_PER_CPU:+"--mem-per-cpu=$SLURM_MEM_PER_CPU"} \
        ${SLURM_MEM_PER_NODE:+"--mem=$SLURM_MEM_PER_NODE"}
}
