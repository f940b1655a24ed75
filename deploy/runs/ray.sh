#!/bin/sh
# Two machines of four 80 GB GPUs as one server, over Ray. vLLM, Ray and this plugin are on both.
#   on the other machine:  deploy/runs/ray.sh [--print] join ADDRESS-OF-THE-FIRST
#   then on the first:     deploy/runs/ray.sh [--print]
. "$(dirname "$0")/run.inc"

if [ "${1-}" = join ]; then
    run ray start --address "$2:6379" --block
    exit
fi
run ray start --head --port 6379
run kimi-linear plan "$MODEL" --gpus 8xH100-80GB --tensor-parallel 8 --context 1M --concurrency 4 --out "$OUT/serve.yaml"
run vllm serve --config "$OUT/serve.yaml" --trust-remote-code --distributed-executor-backend ray --port 8000
