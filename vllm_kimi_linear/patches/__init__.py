"""Patches of vLLM, one a module: symptom, cause, upstream, when it goes away, and `apply()`."""
