#!/bin/sh
# Two GPUs of 141 GB as two servers behind the gateway: one reads long prompts, the other answers.
# Needs nixl (pip install nixl), and 64 GiB of the host's memory.
#   deploy/runs/prefill-decode.sh [--print]
. "$(dirname "$0")/run.inc"

run kimi-linear plan "$MODEL" --gpus 1xH200 --context 1M --out "$OUT/serve.yaml"

# `handing NAME PORT`: the plan's flags in NAME.yaml, with a P2P tier on PORT. While it is handed over, a prompt of a million
# tokens takes 11.5 GB of the host's memory on each side; the one that reads keeps the beginning until it has read the end.
handing() {
    [ "$print" ] || { cat "$OUT/serve.yaml" - >"$OUT/$1.yaml"; } <<YAML
kv-transfer-config:
  kv_connector: OffloadingConnector
  kv_role: kv_both
  kv_connector_extra_config:
    spec_name: TieringOffloadingSpec
    cpu_bytes_to_use: 34359738368
    secondary_tiers:
      - {type: p2p, host: 127.0.0.1, port: $2, unbound_store_timeout_s: 600}
shutdown-timeout: 30
YAML
}
handing decode 5710
handing prefill 5711

# Both servers end with this script.
trap '[ -z "$pids" ] || kill $pids 2>/dev/null || true' EXIT
trap 'exit 143' TERM INT
start env CUDA_VISIBLE_DEVICES=0 vllm serve --config "$OUT/decode.yaml" --trust-remote-code --port 8000
start env CUDA_VISIBLE_DEVICES=1 vllm serve --config "$OUT/prefill.yaml" --trust-remote-code --port 8001

[ "$print" ] || cat >"$OUT/gateway.yaml" <<'YAML'
host: 127.0.0.1
port: 8080
replicas:
  - url: http://127.0.0.1:8000
prefill:
  - url: http://127.0.0.1:8001
    p2p: 127.0.0.1:5711
YAML
# The gateway answers at once; its /readyz says when the first server is up.
run kimi-linear gateway --config "$OUT/gateway.yaml"
