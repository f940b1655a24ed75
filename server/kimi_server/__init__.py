"""What stands around `vllm serve`: launch planner, gateway, playground. HTTP only, never torch."""
