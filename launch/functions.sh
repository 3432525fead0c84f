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

# What users set: in the environment, in launch/env, or both.
run_settings=(LR LR_FROM RUN_DIR MAX_RESTARTS EXCLUDE_AFTER LAUNCHER GPUS_PER_NODE PREFLIGHT_SECONDS
    CONTROLLER_SECONDS RATES AT_ONCE PARTS WORKERS LOGS TASKS TASK_OPTIONS)
site_settings=(SITE_OPTIONS CONTAINER MEGATRON_MUP TORCHRUN MASTER_ADDR MASTER_PORT)

# Refuse settings among a script's arguments: check_arguments ARGUMENT ...
check_arguments() {
    local argument
    for argument in "$@"; do
        [[ " ${run_settings[*]} " != *" ${argument%%=*} "* || $argument != *=* ]] ||
            fail "$argument is given as an argument, but ${argument%%=*} is an environment variable:" \
                "write it before the command, e.g. ${argument%%=*}=... sbatch launch/..."
    done
}

# Refuse what is no learning rate: check_rate NAME VALUE.
check_rate() {
    local number='^([0-9]+[.]?[0-9]*|[.][0-9]+)([eE][-+]?[0-9]+)?$'
    [[ $2 =~ $number && ${2%%[eE]*} == *[1-9]* ]] ||
        fail "$1 is $2; set a positive number, e.g. $1=0.01"
}

# Refuse a RUN_DIR that a YAML string cannot hold, or that OmegaConf would read as a reference.
check_run_dir() {
    # shellcheck disable=SC2016
    case $(realpath --canonicalize-missing "${RUN_DIR:-runs}") in
        *'"'* | *\\* | *'${'* | *$'\n'*)
            fail "RUN_DIR is ${RUN_DIR:-runs in $PWD}; give a folder without \", \\ and \${ in its path"
            ;;
    esac
}

# Source launch/env, and warn of what looks like a setting and is none.
source_settings() {
    local before exported name
    local typo='^(SITE|MEGATRON|MUP|CONTAIN|TORCH|LAUNCH|GPU|RUN_|MAX_|EXCLUDE|PREFL|CONTROL)'
    [[ -e $project/launch/env ]] || return 0
    before=$'\n'$(compgen -v)$'\n'
    # Modules and conda read variables that are not set.
    set +u
    # shellcheck source=launch/env.example
    source "$project/launch/env"
    set -u
    exported=$'\n'$(compgen -e)$'\n'
    for name in $(compgen -v); do
        # What is exported is for other programs.
        if [[ $name =~ $typo && $exported != *$'\n'"$name"$'\n'* && $before != *$'\n'"$name"$'\n'* &&
            " ${run_settings[*]} ${site_settings[*]} " != *" $name "* ]]; then
            echo "warning: launch/env sets $name, which no launch script reads; see launch/env.example" >&2
        fi
    done
}

# Read the site's settings, if there are any, and find the command. Sets
#   SITE_OPTIONS  options for sbatch
#   CONTAINER     options with which srun starts a container (pyxis); empty without one
#   RANK_COMMAND  the command line that runs megatron-mup in a rank: MEGATRON_MUP, or one it finds
#   COMMAND       the same for one process beside this script, in a job inside of the container
# `load_site submit` is for scripts that only submit: a container's command need not be there.
load_site() {
    # shellcheck disable=SC2034
    SITE_OPTIONS=()
    CONTAINER=()
    # Left in the shell of a user, these would tell every rank the same place.
    unset MASTER_ADDR MASTER_PORT RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_RANK
    source_settings
    local contained=''
    # Outside of a job srun would ask for nodes, and wait for them.
    ((${#CONTAINER[@]} == 0)) || ! in_job || contained=yes
    if [[ -z ${MEGATRON_MUP:-} ]]; then
        MEGATRON_MUP=megatron-mup
        if [[ -z $contained && -x $project/.venv/bin/megatron-mup ]]; then
            MEGATRON_MUP=$project/.venv/bin/megatron-mup
        fi
    fi
    # Not assigned to itself: bash would no longer export what came from the environment.
    RANK_COMMAND=("${MEGATRON_MUP[@]}")
    COMMAND=("${RANK_COMMAND[@]}")
    if [[ -n $contained ]]; then
        COMMAND=(srun --export=ALL --nodes=1 --ntasks=1 --overlap
            ${SLURMD_NODENAME:+"--nodelist=$SLURMD_NODENAME"}
            ${SLURM_CPUS_PER_TASK:+"--cpus-per-task=$SLURM_CPUS_PER_TASK"}
            "${CONTAINER[@]}" "${RANK_COMMAND[@]}")
    fi
    [[ ${1:-} != submit || ${#CONTAINER[@]} == 0 ]] || return 0
    type -P "${COMMAND[0]}" >/dev/null && return
    [[ ${COMMAND[0]} != *' '* ]] || fail "the command '${COMMAND[0]}' is not there; of several words" \
        "make a list in launch/env: MEGATRON_MUP=(${COMMAND[0]})"
    fail "the command ${COMMAND[0]} is not there:" \
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
