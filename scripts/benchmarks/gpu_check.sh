#!/usr/bin/env bash
# All checks that need a GPU, in one command of less than eight minutes: tests of kernels and caches, and all figures.
#
#     scripts/benchmarks/gpu_check.sh                              into results/runs and results/plots
#     OUT=folder PYTHON=.venv/bin/python scripts/benchmarks/gpu_check.sh
#     scripts/benchmarks/gpu_check.sh --only attention,profile-32k
#     scripts/benchmarks/gpu_check.sh --cpu                        the same steps without a GPU, tiny, to try this script
#
# Steps: tests, attention, attention-b8, largest, profile-4k, profile-32k. The attention steps print measured times
# beside the least that bytes and operations take: by the data sheet of a GPU known to gpt2/experiments/gpu_roofline.py,
# else by the measured speed of copies. Each step has its own time limit, and all
# together have GPU_CHECK_SECONDS. If a step fails or runs out of time, the others still run, and the exit code is 1.
# Nothing is installed. With --cpu results go to OUT or a temporary folder, never to results/, and tests run in Triton's
# interpreter. Environment:
#   OUT                  folder to which JSON, pictures and the log are copied as well, at most eight files, as a remote
#                        machine may return only few; pictures of a single context length are left out
#   PYTHON               interpreter with all packages, python3 by default
#   GPU_CHECK_SECONDS    time limit of all steps together, 470 by default
set -u
OUT=${OUT:-}
[[ -z $OUT ]] || { mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd); } || exit 1
cd "$(dirname "$0")/../.." || exit 1
PYTHON=${PYTHON:-python3} LIMIT=${GPU_CHECK_SECONDS:-470} ONLY='' CPU=''
STEPS=tests,attention,attention-b8,largest,profile-4k,profile-32k
summary=() failed=0

usage() { sed -n '2,/^set -u/{/^set -u/d;s/^# \{0,1\}//;p}' "$0"; }

wanted() { [[ -z $ONLY || ",$ONLY," == *",$1,"* ]]; }

step() { # NAME SECONDS COMMAND…
    local name=$1 limit=$2 left=$((LIMIT - SECONDS)) start=$SECONDS code
    shift 2
    wanted "$name" || return 0
    limit=$((limit < left ? limit : left))
    if ((limit < 1)); then
        failed=1 summary+=("NO TIME  $name")
        return 0
    fi
    printf '\n== %s, at most %d s\n' "$name" "$limit"
    timeout --kill-after=5 "$limit" "$@"
    code=$?
    case $code in
    0) summary+=("ok       $name, $((SECONDS - start)) s") ;;
    124 | 137) failed=1 summary+=("TIMEOUT  $name, after $limit s") ;;
    *) failed=1 summary+=("FAILED   $name, exit code $code") ;;
    esac
}

measure() { # NAME SECONDS STEM SCRIPT FLAG…: a step that writes runs/STEM.json, and for some scripts a picture
    local name=$1 limit=$2 stem=$3 script=$4
    shift 4
    wanted "$name" || return 0
    step "$name" "$limit" "$PYTHON" "scripts/$script" "$@" --device "$DEVICE" --output "$WORK/runs/$stem.json"
    [[ -f $WORK/runs/$stem.png ]] && mv "$WORK/runs/$stem.png" "$WORK/plots/"
    made+=("$stem")
}

keep() { # copy the files that this run has made into OUT
    local stem
    for stem in "${made[@]}"; do
        if [[ $WORK/runs/$stem.json -nt $STARTED ]]; then cp "$WORK/runs/$stem.json" "$OUT/"; fi
        case $stem in *_b8* | *_32k*) continue ;; esac
        if [[ $WORK/plots/$stem.png -nt $STARTED ]]; then cp "$WORK/plots/$stem.png" "$OUT/"; fi
    done
}

describe() { # print the machine and versions to stderr, and the machine's name for file names to stdout
    "$PYTHON" - "$DEVICE" <<'END'
import importlib.metadata, sys
import torch
from gpt2.common import provenance
def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "missing"
versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "triton"))
print(f"{provenance.device_name(sys.argv[1])}: Python {sys.version.split()[0]}, {versions}", file=sys.stderr)
if sys.argv[1] != "cpu" and not torch.cuda.is_available():
    sys.exit("no GPU that this PyTorch sees: run with --cpu to try the script without one")
print(provenance.device_slug(sys.argv[1]))
END
}

on_gpu() {
    local workers=() shape=configs/models/qwen2.5-7b.json own=(--dtype bfloat16 --preset kv4 kv8)
    # Each process compiles its kernels one after the other, which takes most of the tests' time
    "$PYTHON" -c 'import xdist' 2>/dev/null && workers=(-n 6)
    step tests 120 "$PYTHON" -m pytest -q --disable-warnings -p no:cacheprovider "${workers[@]}" tests/compression/kernels/test_gpu.py
    measure attention 90 "attention_step_$slug" benchmarks/attention.py --bound --repeats 50 \
        --context-lengths 4096,16384,65536,131072
    measure attention-b8 50 "attention_step_${slug}_b8" benchmarks/attention.py --bound --repeats 50 \
        --context-lengths 16384 --batch-size 8
    measure largest 120 "largest_batch_${slug}_qwen2.5-7b" benchmarks/largest_batch.py --model "$shape" "${own[@]}" \
        --context-length 32768 --decode-tokens 4
    measure profile-4k 120 "profile_${slug}_qwen2.5-7b_4k" profile_kv_performance.py --model "$shape" "${own[@]}" \
        --direct --context-lengths 4096 --batch-sizes 1,8,32 --decode-tokens 8 --repeats 2
    # No batch of 32 here: 32 prompts of 32,768 tokens at once don't fit beside the model with any cache
    # Filled with noise: ten prompts of 8 times 32,768 tokens alone take two minutes of an H200
    measure profile-32k 100 "profile_${slug}_qwen2.5-7b_32k" profile_kv_performance.py --model "$shape" "${own[@]}" \
        --noise --direct --context-lengths 32768 --batch-sizes 1,8 --decode-tokens 8 --repeats 1
}

on_cpu() {
    local own=(--model "$WORK/tiny.json" --preset kv4)
    echo '{"model_type": "llama", "vocab_size": 97, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}' >"$WORK/tiny.json"
    local tiny=(--heads 4 --kv-heads 2 --head-dim 32 --flush-mib 1 --copy-mib 1 --repeats 2 --quantizers int4_channel)
    step tests 60 env TRITON_INTERPRET=1 "$PYTHON" -m pytest -q --disable-warnings -p no:cacheprovider tests/compression/kernels/test_gpu.py \
        -k 'test_every_quantizer and int4_channel and bfloat16'
    measure attention 60 attention_step_cpu benchmarks/attention.py --bound "${tiny[@]}" --context-lengths 64,128
    measure attention-b8 60 attention_step_cpu_b8 benchmarks/attention.py --bound "${tiny[@]}" --context-lengths 64 --batch-size 8
    measure largest 60 largest_batch_cpu_tiny benchmarks/largest_batch.py "${own[@]}" --context-length 128 --most 2
    measure profile-4k 60 profile_cpu_tiny_4k profile_kv_performance.py "${own[@]}" \
        --direct --context-lengths 64 --batch-sizes 1,2 --decode-tokens 2 --repeats 1
    measure profile-32k 60 profile_cpu_tiny_32k profile_kv_performance.py "${own[@]}" \
        --direct --context-lengths 128 --batch-sizes 1 --decode-tokens 2 --repeats 1
}

main() {
    local slug made=()
    mkdir -p "$WORK/runs" "$WORK/plots"
    STARTED=$(mktemp)
    [[ -z $CPU ]] && nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
    slug=$(describe) || return 1
    if [[ $CPU ]]; then on_cpu; else on_gpu; fi
    [[ $OUT ]] && keep
    rm -f "$STARTED"
    printf '\n== in %d s\n' "$SECONDS"
    printf '%s\n' "${summary[@]}"
    return "$failed"
}

while (($#)); do
    case $1 in
    --cpu) CPU=1 ;;
    --only)
        ONLY=${2:-} && shift
        for name in ${ONLY//,/ }; do
            [[ ",$STEPS," == *",$name,"* ]] || { echo "no step $name: there are $STEPS" >&2 && exit 2; }
        done
        ;;
    -h | --help) usage && exit 0 ;;
    *) usage >&2 && exit 2 ;;
    esac
    shift
done
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
DEVICE=cuda WORK=results
[[ $CPU ]] && DEVICE=cpu && WORK=$(mktemp -d)
if [[ $OUT ]]; then
    main 2>&1 | tee "$OUT/gpu_check.log"
    code=${PIPESTATUS[0]}
else
    main
    code=$?
fi
[[ $CPU ]] && rm -rf "$WORK"
exit "$code"
