"""Chooses how a model is spread over a machine and what vLLM is told; needs neither torch nor vLLM."""
