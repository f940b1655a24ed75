"""Patches of vLLM, one a file."""
