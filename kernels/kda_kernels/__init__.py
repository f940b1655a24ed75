"""Kimi Delta Attention (KDA) as a library: one layer's convolution, gates, recurrence and gated norm.

`kda_kernels.interface` holds the operations and the records that they take, `kda_kernels.reference` the same operations
in plain torch. The mathematics is in docs/kda.md. Needs torch, knows nothing of vLLM.
"""
