# shellcheck shell=bash
# What the launch scripts share. Sets `project`, the folder of this checkout.

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

# Read the site's settings, if there are any, and find the command. Sets MEGATRON_MUP, the command
# line that runs megatron-mup, and SITE_OPTIONS, options for sbatch.
load_site() {
    SITE_OPTIONS=()
    if [[ -e $project/launch/env ]]; then
        # shellcheck source=launch/env.example
        source "$project/launch/env"
    fi
    if [[ -z ${MEGATRON_MUP:-} ]]; then
        MEGATRON_MUP=megatron-mup
        if [[ -x $project/.venv/bin/megatron-mup ]]; then
            MEGATRON_MUP=$project/.venv/bin/megatron-mup
        fi
    fi
    type -P "${MEGATRON_MUP[0]}" >/dev/null || fail "the command ${MEGATRON_MUP[0]} is not there:" \
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
