"""Kernels for a decode step of one to a few tokens: a layer in few launches, weights on their way before their turn.

`interface` finds the operations for a device: `cuda`, in Triton, or `cpu`, in C; `reference` has them in plain torch.
The package needs torch and knows nothing of vLLM; kernels/README.md has the contract as tables.
"""
