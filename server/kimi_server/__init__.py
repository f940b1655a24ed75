"""What stands around `vllm serve`: the command, the launch planner. HTTP and the standard library, never torch."""
