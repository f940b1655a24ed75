#!/bin/sh
# Four GPUs of 80 GB as one server: 1M tokens of context, four such documents at once.
#   deploy/runs/million-tokens.sh [--print]
. "$(dirname "$0")/run.inc"

# The plan says what else would fit, and why; look at serve.yaml before you start it.
run kimi-linear plan "$MODEL" --gpus 4xH100-80GB --tensor-parallel 4 --context 1M --concurrency 4 --out "$OUT/serve.yaml"

run vllm serve --config "$OUT/serve.yaml" --trust-remote-code --host 127.0.0.1 --port 8000
