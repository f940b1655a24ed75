"""A program with the arguments of `vllm serve` which answers as one, at once, what the file FAKE_VLLM says.

The file is JSON: `answers` has the text and the token ids for the end of a prompt, `prompt_ids`, `blocks`, and
`never_ready`, with which /health never answers.
"""

import json
import os
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

SAYS: dict[str, Any] = json.loads(Path(os.environ["FAKE_VLLM"]).read_text())
LOG = ("non-default args", "Initializing a V1 LLM engine", "Starting to load model", "Loading weights took 0.1 s")


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/metrics":
            self._send(f'vllm:cache_config_info{{num_gpu_blocks="{SAYS["blocks"]}"}} 1.0\n'.encode())
        elif self.path == "/v1/models":
            self._send(json.dumps({"data": [{"id": "model", "max_model_len": 32768}]}).encode())
        else:
            self._send(b"", 503 if SAYS.get("never_ready") else 200)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][-1]["content"]
        text, ids = next(said for end, said in SAYS["answers"].items() if prompt.endswith(end))
        chunk = {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "model"}
        begun = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
        first = {**chunk, "prompt_token_ids": SAYS["prompt_ids"], "choices": [begun]}
        choice = {"index": 0, "delta": {"content": text}, "finish_reason": "stop", "token_ids": ids}
        events = (first, {**chunk, "choices": [choice]})
        lines = [f"data: {json.dumps(event)}\n\n" for event in events]
        self._send("".join([*lines, "data: [DONE]\n\n"]).encode(), kind="text/event-stream")

    def _send(self, body: bytes, status: int = 200, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


if __name__ == "__main__":
    for line in LOG:
        print(line, flush=True)
    port = int(sys.argv[sys.argv.index("--port") + 1])
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
