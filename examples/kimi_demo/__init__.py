"""For the demo, the tests and the benchmarks: small checkpoints, `vllm serve` as a child, the HF reference."""
