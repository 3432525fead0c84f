#!/usr/bin/env bash
# Make token shards on many machines; the result is the same as on one.
#
#   sbatch launch/preprocess.sh --input 'corpus/*.jsonl.zst' --tokenizer-model bpe.model \
#       --output-prefix shards/corpus [what else `megatron-mup data preprocess` takes]
#
# submits an array of PARTS jobs (8), each of which tokenizes its share of the inputs into the
# folder PREFIX.work, and a last job, which does what a lost one left, makes the shards and checks
# them. `bash launch/preprocess.sh ...` does the same without a job of its own. From the environment:
# PARTS; WORKERS, processes of a job (its CPUs); LOGS, folder of the logs (logs/preprocess).
# What sbatch is told about partition, time, CPUs and memory holds for each of these jobs.
#
#SBATCH --job-name=preprocess
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --mem-per-cpu=2G
#SBATCH --time=12:00:00
# Started twice, this script would submit twice; the jobs that it submits are requeued.
#SBATCH --no-requeue
set -euo pipefail

# Slurm runs a copy from its spool; the job's record tells where the script was.
here=$(dirname "$(realpath "$0")")
is_batch_job=
if [[ ! -e $here/functions.sh ]]; then
    is_batch_job=yes
    here=$(scontrol show job "${SLURM_JOB_ID:-none}") || true
    here=${here#*Command=}
    here=${here%%/preprocess.sh*}
fi
[[ -e $here/functions.sh ]] || {
    echo "error: functions.sh is not found; keep this script's name and folder, preprocess.sh" >&2
    exit 2
}
# shellcheck source=launch/functions.sh
source "$here/functions.sh"

# Refuse what must not be submitted. Sets PREFIX and OVERWRITE.
read_arguments() {
    local argument previous='' input='' model=''
    PREFIX='' OVERWRITE=''
    # The empty one at the end stands for the value that the last option may lack.
    for argument in "$@" ''; do
        case $previous in
            --input | --tokenizer-model | --output-prefix)
                [[ -n $argument && $argument != --* ]] || fail "$previous has no value; pass a path"
                ;;
        esac
        case $argument in
            --part | --part=*) fail "this script gives --part to each job; leave it out, set PARTS" ;;
            - | --input=-) fail "--input - is standard input, which a job lacks; pass files" ;;
            --input= | --tokenizer-model=) fail "${argument%=} has no value; pass a path" ;;
            --input | --input=*) input=yes ;;
            --tokenizer-model | --tokenizer-model=*) model=yes ;;
            --output-prefix=*) PREFIX=${argument#*=} ;;
            --overwrite) OVERWRITE=yes ;;
        esac
        [[ $previous != --output-prefix ]] || PREFIX=$argument
        previous=$argument
    done
    [[ -n $input ]] || fail "--input is missing; pass files, folders or quoted globs; see --help"
    [[ -n $model ]] ||
        fail "--tokenizer-model is missing; pass a .model or a tokenizer.json; see --help"
    [[ -n $PREFIX ]] || fail "--output-prefix is missing; pass where the shards go; see --help"
}

# Which manifest is there: its inode and time, or "none".
manifest_stamp() {
    stat --format=%i-%.9Y "$PREFIX.manifest.json" 2>/dev/null || echo none
}

submit_jobs() {
    [[ $PARTS =~ ^[1-9][0-9]*$ ]] || fail "PARTS is $PARTS; set the number of jobs, e.g. PARTS=8"
    [[ -z ${SLURM_ARRAY_TASK_ID:-} ]] || fail "sbatch got --array; leave it out and set PARTS"
    check_arguments "$@"
    read_arguments "$@"
    type -P sbatch >/dev/null ||
        fail "sbatch is not there: run this where Slurm is, or without Slurm run on each machine" \
            "\`megatron-mup data preprocess ... --part i/N\` with its own i from 1 to N, and then" \
            "the same command without --part on one of them"
    [[ $(manifest_stamp) == none || -n $OVERWRITE || -e $PREFIX.work ]] ||
        fail "output exists: $PREFIX.manifest.json; pass --overwrite or another --output-prefix"
    local logs inherited options=(--export=ALL --requeue --open-mode=append) array last
    mkdir -p "$LOGS"
    logs=$(realpath "$LOGS")
    if [[ -n $is_batch_job ]]; then
        inherited=$(own_resources)
        mapfile -t -O "${#options[@]}" options <<<"$inherited"
    fi
    options+=("${SITE_OPTIONS[@]}")
    array=$(sbatch --parsable "${options[@]}" --array="0-$((PARTS - 1))" \
        --output="$logs/%x-%A_%a.out" "$here/preprocess.sh" part "$@") ||
        fail "sbatch refused the jobs (see above); nothing was submitted"
    array=${array%%;*}
    if ! last=$(sbatch --parsable "${options[@]}" --dependency="afterany:$array" \
        --job-name=preprocess-finish --output="$logs/%x-%j.out" \
        "$here/preprocess.sh" finish "$(manifest_stamp)" "$@"); then
        scancel "$array"
        fail "the last job was refused (see above); the others, job $array, are cancelled"
    fi
    printf '%s\n' "parts:  job $array, $PARTS tasks" \
        "finish: job ${last%%;*} makes and checks the shards when all parts have ended" \
        "logs:   $logs"
}

# Tokenize the share of one task of the array.
run_part() {
    exec "${COMMAND[@]}" data preprocess --workers "$WORKERS" \
        --part "$((SLURM_ARRAY_TASK_ID + 1))/$SLURM_ARRAY_TASK_COUNT" "$@"
}

# Do what is left, make the shards, check them. First argument: the manifest's stamp at submission.
finish() {
    local before=$1 now
    shift
    read_arguments "$@"
    now=$(manifest_stamp)
    # With a new manifest and no work left, this job was requeued while it checked the shards.
    if [[ $now == none || $now == "$before" || -e $PREFIX.work ]]; then
        "${COMMAND[@]}" data preprocess --workers "$WORKERS" "$@"
    fi
    exec "${COMMAND[@]}" data verify --workers "$WORKERS" "$PREFIX"
}

for argument in "$@"; do
    if [[ $argument == --help ]]; then
        print_help "$0"
        exit
    fi
done
PARTS=${PARTS:-8}
LOGS=${LOGS:-logs/preprocess}
case ${1:-} in
    part | finish) load_site ;;
    *) load_site submit ;;
esac
WORKERS=${WORKERS:-${SLURM_CPUS_PER_TASK:-1}}
case ${1:-} in
    part) run_part "${@:2}" ;;
    finish) finish "${@:2}" ;;
    *) submit_jobs "$@" ;;
esac
