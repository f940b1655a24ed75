"""Kimi Delta Attention (KDA) as a library: one layer's convolution, gates, recurrence and gated norm.

`kda_kernels.ops` holds the entry points, `kda_kernels.reference` the same functions in plain torch,
`kda_kernels.types` what they take. The mathematics is in docs/kda.md. Needs torch, knows nothing of vLLM.
"""
