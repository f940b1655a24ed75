#!/bin/sh
# One GPU that holds the whole model, such as an H200: plan for two documents of 1M tokens and serve, in one step.
#   deploy/runs/single-gpu.sh [--print]
. "$(dirname "$0")/run.inc"

# Arguments after -- are for vLLM. The published checkpoint brings its own tokenizer code: hence --trust-remote-code.
run kimi-linear serve "$MODEL" --context 1M --concurrency 2 --out "$OUT/serve.yaml" -- --trust-remote-code
