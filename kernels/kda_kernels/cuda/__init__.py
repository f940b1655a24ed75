"""KDA on NVIDIA GPUs, in Triton: decode and spec_decode in one launch each, prefill in chunks on the tensor cores.

None synchronises with the host, so none checks the values of the tables.
"""

import torch

try:
    import triton  # noqa: F401 - here for the message alone
except ImportError as error:
    raise ImportError("the GPU kernels need Triton, which comes with PyTorch's CUDA builds") from error

from kda_kernels.cuda.decode import decode
from kda_kernels.cuda.prefill import prefill
from kda_kernels.cuda.spec_decode import spec_decode

__all__ = ["decode", "prefill", "spec_decode", "supports"]


def supports(dtype: torch.dtype, head_dim: int, state_dtype: torch.dtype) -> tuple[bool, str]:
    """Whether these kernels can serve, and the reason."""
    if dtype not in (torch.float32, torch.bfloat16):
        return False, f"the Triton kernels take float32 and bfloat16 inputs, not {dtype}"
    if state_dtype not in (torch.float32, torch.bfloat16):
        return False, f"the Triton kernels keep the state in float32 or bfloat16, not {state_dtype}"
    if head_dim not in (64, 128):
        return False, f"the Triton kernels take head sizes 64 and 128, not {head_dim}"
    return True, "Triton kernels"
