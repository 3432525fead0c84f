#!/usr/bin/env bash
# Checks and measures the package on one Hopper GPU of a machine without network, in stages of at
# most 8 minutes; docs/gpu.md says what goes into the folder of --carried.
#   tools/gpu_check.sh                         list the stages
#   tools/gpu_check.sh STAGE [--carried DIR] [--out DIR] [--site DIR] [--engine te220|te217] [-- ARGS]
# ARGS go to the stage's last command.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

limit_seconds=480
python=${PYTHON:-python3}
carried=carried out=gpu_results site=${HOME:-/tmp}/gpu_check_site engine=te220
stage='' arguments=()

stages="\
doctor      versions, GPU, kernels, FP8
tests       layouts, FP8 recipes and memory against the estimates
equality    TransformerEngine against the local spec and stock Megatron-Core; the attention scale
resume      resuming bit for bit; a checkpoint written on a CPU
losses      FP8 recipes against bf16 over 200 steps of text
coordinates coordinate checks in bf16 and FP8
ranges      FP8 amax, underflow and saturation by matrix and width
speed       width 2048, depth 24, seq 2048: muP, SP, stock and plain PyTorch in bf16
speed-fp8   the same in FP8, and FP8 against bf16
speed-long  width 2048, depth 24, seq 4096: muP against stock in both precisions
speed-wide  width 4096, depth 16, seq 4096: muP in FP8 against bf16
speed-stock width 4096, depth 16, seq 4096: muP against stock in bf16
profile     kernels, gaps and launches of width 2048, depth 24, seq 2048
stage       layers of the 10B model against the plan, and a calibration
sweep-fp8   FP8's best learning rate against bf16's; runs.csv in --out is gone on from
sweep-sp    muP against SP at widths 128 to 2048; likewise"

fail() {
    echo "gpu_check.sh: $*" >&2
    exit 2
}

list() {
    echo "stages of tools/gpu_check.sh, each of at most $((limit_seconds / 60)) minutes:"
    echo "$stages"
}

read_arguments() {
    while [ $# -gt 0 ]; do
        case $1 in
        --carried | --out | --site | --engine)
            [ $# -ge 2 ] || fail "$1 needs a value"
            printf -v "${1#--}" %s "$2"
            shift 2
            ;;
        --)
            shift
            arguments=("$@")
            return
            ;;
        -*) fail "unknown option $1; use --carried, --out, --site, --engine or -- ARGS" ;;
        *)
            [ -z "$stage" ] || fail "two stages, $stage and $1; give one"
            stage=$1
            shift
            ;;
        esac
    done
}

# TransformerEngine imports these two for its export to ONNX, which nothing here uses.
stand_in() {
    [ -e "$site/$1" ] || cat >"$site/$1.py" <<'END'
import sys
from unittest import mock

sys.modules[__name__] = mock.MagicMock(name=__name__)
END
}

# Unpacks TransformerEngine and installs the wheels into a folder of their own, once.
unpack() {
    local archive=$carried/${engine}_sm90_site.tar.xz wheels
    site=$site/$engine
    [ ! -e "$site/complete" ] || return 0
    [ -f "$archive" ] || fail "$archive is missing; put it into the folder of --carried (docs/gpu.md)"
    compgen -G "$carried/megatron_core-*.whl" >/dev/null ||
        fail "$carried has no megatron_core-*.whl; download the wheels into it (docs/gpu.md)"
    rm -rf "$site"
    mkdir -p "$site"
    tar -C "$site" -xJf "$archive"
    wheels=("$carried"/*.whl)
    "$python" -m pip install -q --no-index --no-deps --target "$site" "${wheels[@]}"
    stand_in onnx
    stand_in onnxscript
    touch "$site/complete"
}

# TransformerEngine looks for cuDNN, NVRTC and cuRAND under CUDA_HOME first: torch's own are meant.
enter_environment() {
    local packages libraries
    packages=$("$python" -c 'import os, torch; print(os.path.dirname(os.path.dirname(torch.__file__)))')
    libraries=$(compgen -G "$packages/nvidia/*/lib" | paste -sd:) || true
    export PYTHONPATH=$site:$PWD PYTHONUNBUFFERED=1 CUDA_HOME=${CUDA_HOME:-/usr/local/cuda}
    export LD_LIBRARY_PATH=$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
    # torch reads it at the first product of a process, before a test asks for determinism.
    export CUBLAS_WORKSPACE_CONFIG=${CUBLAS_WORKSPACE_CONFIG:-:4096:8}
}

# Runs a command of the stage for what is left of its time.
run() {
    local left=$((limit_seconds - SECONDS)) code=0
    [ "$left" -gt 0 ] || fail "stage $stage: no time is left for: $*"
    timeout --kill-after=30 "$left" "$@" || code=$?
    # 75: a sweep that was told to stop has kept its rows.
    [ "$code" != 124 ] || echo "gpu_check.sh: stage $stage was cut at $limit_seconds s: $*" >&2
    return "$code"
}

run_tests() {
    # The plugins of torch's environment were made for its own pytest.
    export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1
    run "$python" -m pytest -p pytest_timeout -m gpu --measured "$out/$stage.json" "$@" ${arguments[@]+"${arguments[@]}"}
}

# Two such models do not fit into the memory at once.
wide=(--width 4096 --depth 16 --seq-length 4096 --micro-batch-size 4 --alone --pairs 8)

measure() {
    # Blocks of many sizes come and go between contestants.
    export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
    run "$python" -m megatron_mup.benchmark.gpu_speed --output "$out/$stage.json" "$@" \
        ${arguments[@]+"${arguments[@]}"}
}

# Runs what has no row yet, for as long as there is time; the folder of the runs stays outside --out.
sweep() {
    local folder=$site/../$stage code=0 text
    for text in "$carried"/text.jsonl*; do
        [ ! -f "$text" ] || arguments=(--text "$text" ${arguments[@]+"${arguments[@]}"})
    done
    # A worker compiles one small kernel, the activation: a pool of compilers takes longer to start.
    export TORCHINDUCTOR_COMPILE_THREADS=${TORCHINDUCTOR_COMPILE_THREADS:-1}
    mkdir -p "$folder"
    [ ! -e "$out/$stage.csv" ] || cp "$out/$stage.csv" "$folder/runs.csv"
    run "$python" -m megatron_mup sweep run "$1" --out "$folder" --gpu-share 4 --threads 1 \
        ${arguments[@]+"${arguments[@]}"} || code=$?
    [ ! -e "$folder/runs.csv" ] || cp "$folder/runs.csv" "$out/$stage.csv"
    "$python" -m megatron_mup sweep status "$folder" --json >"$out/$stage.json" || true
    return "$code"
}

run_stage() {
    case $stage in
    doctor)
        run "$python" -m megatron_mup doctor
        run_tests tests/gpu/test_machine.py
        ;;
    tests) run_tests tests/gpu/test_fp8_layouts.py tests/gpu/test_memory_model.py ;;
    equality)
        run_tests tests/gpu/test_transformer_engine.py tests/gpu/test_attention_scale.py \
            tests/gpu/test_stock.py
        ;;
    resume) run_tests tests/gpu/test_resume.py ;;
    losses) run_tests tests/gpu/test_fp8_losses.py ;;
    coordinates) run_tests tests/gpu/test_coordinate_check.py ;;
    ranges) run_tests tests/gpu/test_fp8_ranges.py ;;
    speed) measure --precision bf16 ;;
    speed-fp8) measure --precision bf16,fp8 --against stock --pairs 10 ;;
    speed-long) measure --seq-length 4096 --against stock --pairs 10 ;;
    speed-wide) measure "${wide[@]}" --against '' ;;
    speed-stock) measure "${wide[@]}" --against stock --precision bf16 ;;
    profile) measure --profile ;;
    stage)
        run "$python" -m megatron_mup.benchmark.stage --output "$out/$stage.json" \
            --calibration "$out/calibration.yaml" ${arguments[@]+"${arguments[@]}"}
        ;;
    sweep-fp8) sweep examples/fp8_learning_rate/sweep.yaml ;;
    sweep-sp) sweep examples/mup_against_sp_gpu/sweep.yaml ;;
    esac
}

# What leaves the machine is at most 8 files of less than 16 MiB, none deeper than one folder.
check_out() {
    local count
    count=$(find "$out" -type f | wc -l)
    [ "$count" -le 8 ] || fail "$out holds $count files, more than 8; give another --out"
    [ -z "$(find "$out" -type f -size +16383k)" ] || fail "a file in $out has 16 MiB or more"
    [ -z "$(find "$out" -mindepth 3)" ] || fail "$out holds folders in folders"
}

main() {
    local code=0
    read_arguments "$@"
    if [ -z "$stage" ]; then
        list
        return
    fi
    grep -q "^$stage " <<<"$stages" || fail "no stage '$stage'; $(list)"
    [[ $engine == te2* ]] || fail "--engine is $engine; use te220 or te217"
    unpack
    enter_environment
    mkdir -p "$out"
    SECONDS=0
    run_stage 2>&1 | tee "$out/$stage.log" || code=$?
    echo "stage $stage: $([ "$code" = 0 ] && echo passed || echo "FAILED ($code)") after $SECONDS s"
    check_out
    return "$code"
}

main "$@"
