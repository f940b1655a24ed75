"""Products in bfloat16 are right where neither oneDNN nor the C kernels have one."""

import pytest
import torch

from vllm_kimi_linear.cpu import products


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 50])
@pytest.mark.parametrize("biased", [False, True])
def test_plain_product(monkeypatch: pytest.MonkeyPatch, rows: int, biased: bool) -> None:
    """In pieces, the last a short one, and rounded once: half a unit of bfloat16 is 1 / 256."""
    monkeypatch.setattr(products, "has_onednn", lambda dtype: False)
    monkeypatch.setattr(products, "takes_c_kernels", lambda dtype: False)
    monkeypatch.setattr(products, "PIECE", 7 * 96)
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(size, generator=generator).bfloat16() for size in ((rows, 96), (100, 96), (100,)))
    found = products.linear(x, weight, bias if biased else None)
    exact = x.double() @ weight.double().T + (bias.double() if biased else 0)
    assert (found.dtype, found.shape) == (torch.bfloat16, (rows, 100))
    torch.testing.assert_close(found.double(), exact, rtol=1 / 250, atol=1e-4)
