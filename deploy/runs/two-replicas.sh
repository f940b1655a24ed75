#!/bin/sh
# Four GPUs of 80 GB as two servers behind the gateway: one address, and a session stays where its prefix is cached.
#   deploy/runs/two-replicas.sh [--print]
. "$(dirname "$0")/run.inc"

run kimi-linear plan "$MODEL" --gpus 4xH100-80GB --tensor-parallel 2 --context 1M --concurrency 4 --out "$OUT/serve.yaml"

# Both servers end with this script.
trap '[ -z "$pids" ] || kill $pids 2>/dev/null || true' EXIT
trap 'exit 143' TERM INT
start env CUDA_VISIBLE_DEVICES=0,1 vllm serve --config "$OUT/serve.yaml" --trust-remote-code --port 8000
start env CUDA_VISIBLE_DEVICES=2,3 vllm serve --config "$OUT/serve.yaml" --trust-remote-code --port 8001

[ "$print" ] || cat >"$OUT/gateway.yaml" <<'YAML'
host: 127.0.0.1
port: 8080
replicas:
  - url: http://127.0.0.1:8000
  - url: http://127.0.0.1:8001
YAML
# The gateway answers at once; its /readyz says when a server is up.
run kimi-linear gateway --config "$OUT/gateway.yaml"
