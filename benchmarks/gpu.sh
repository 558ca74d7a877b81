#!/usr/bin/env bash
# One part of what only a GPU can show: benchmarks/gpu.sh PART FOLDER
#
#   tests    every test that needs CUDA, and the fast tests of the core with CUDA as default device
#   kernels  each Triton kernel against the bandwidth of a copy, and the launches of a step
#   loss     the loss against the textbook form: batches, orders, eager, compiled and graphed
#   routes   the routes to the entropy, and functionals against code by hand
#   step     a fine-tuning step of ViT-B and Hiera-B+ at 1024 pixels, batch 4, in bfloat16
#   mixed    200 steps of the small SAM in float32, bfloat16 and float16
#   evidence what is missing of a part of the evidence, a run on each core: evidence FOLDER primary
#            --data DATA --teacher WEIGHTS; the same command goes on after a stop
#
# Needs PyTorch, einops, pytest, pytest-xdist, pytest-benchmark, hypothesis and matplotlib; `step` and
# `mixed` also need peft, segment_anything and sam2, and `evidence` the extra of that name. Results are
# written to the folder. Further arguments go to the program of the part. Without a GPU each part runs in
# a reduced form.
set -euo pipefail

parts="tests|kernels|loss|routes|step|mixed|evidence"
part=${1:?"usage: benchmarks/gpu.sh $parts FOLDER"}
folder=${2:?"name a folder for the results"}
shift 2
if [[ ! $part =~ ^($parts)$ ]]; then
    echo "there is no part $part: ${parts//|/, }" >&2
    exit 2
fi
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
cd "$(dirname "$0")/.."
export PYTHONPATH=".${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
gpu=$("$python" -c 'import torch; print(int(torch.cuda.is_available()))')

keep() { tee "$folder/$1"; }

case $part in
tests)
    failed=0
    if ((gpu)); then workers=8 device=cuda; else workers=0 device=cpu; fi
    "$python" -m pytest -q -p no:cacheprovider -p no:benchmark -n "$workers" tests/test_triton.py tests/test_precision.py \
        tests/information -k "$( ((gpu)) && echo 'test_triton or precision or cuda' || echo joint)" \
        -m 'slow or not slow' "$@" | keep cuda-tests.txt || failed=1
    without=(--ignore=tests/infosam/test_processes.py)
    "$python" -c 'import segment_anything, sam2, transformers' 2>/dev/null ||
        without+=(--ignore=tests/infosam/test_features.py)
    "$python" -m pytest -q -p no:cacheprovider -p no:benchmark -n "$workers" --device "$device" "${without[@]}" \
        tests/information tests/infosam $( ((gpu)) || echo -k test_terms) "$@" |
        keep "default-device-tests.txt" || failed=1
    exit $failed
    ;;
kernels) "$python" benchmarks/kernels.py "$@" | keep kernels.md ;;
loss)
    reduced=()
    ((gpu)) || reduced=(-k "[2-channels and -2-eager]")
    "$python" benchmarks/run.py --results "$folder" "${reduced[@]}" "$@"
    ;;
routes)
    reduced=()
    ((gpu)) || reduced=(--sizes 64 129 --largest 1)
    "$python" benchmarks/routes.py --results "$folder" "${reduced[@]}" "$@"
    ((gpu)) || reduced=(--sizes 16 --alphas 2 --dimensions 64 --rounds 1)
    "$python" benchmarks/by_hand.py --results "$folder" "${reduced[@]}"
    ;;
step)
    if ((gpu)); then sam=vit_b sam2=sam2.1_hiera_b+ rounds=15; else sam=tiny sam2=tiny rounds=1; fi
    for of in "sam $sam" "sam2 $sam2"; do
        read -r package model <<<"$of"
        "$python" benchmarks/step.py --package "$package" --model "$model" --bf16 \
            --rounds "$rounds" "$@"
    done | keep step.txt
    ;;
mixed) "$python" benchmarks/mixed_precision.py --steps "$( ((gpu)) && echo 200 || echo 3)" "$@" | keep mixed.md ;;
evidence)
    reduced=()
    ((gpu)) || reduced=(--dry-run)
    "$python" benchmarks/evidence/evidence.py "$@" --output "$folder" --jobs "$(nproc)" --threads 1 "${reduced[@]}" |
        keep evidence.txt
    ;;
esac
