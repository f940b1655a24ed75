"""Kernels for a decode step of one to a few tokens: a layer in few launches, weights on their way before their turn.

`interface` has the operations with their arguments, `reference` the same in plain torch, `cuda` the Triton kernels.
The package needs torch and knows nothing of vLLM; kernels/README.md has the contract as tables.
"""
