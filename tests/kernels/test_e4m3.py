"""Widening by a shift gives what torch's cast does, for every code."""

import pytest
import torch

from modelspec.kernels.e4m3 import widened

CODES = torch.arange(256, dtype=torch.uint8)
FORMATS = [torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2]


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_every_code_is_widened_exactly(format: torch.dtype) -> None:
    q = CODES.view(format)
    torch.testing.assert_close(widened(q), q.float(), rtol=0, atol=0, equal_nan=True)
    finite = q[q.float().isfinite()]
    wide = widened(finite)
    assert torch.equal(wide.view(torch.int32), finite.float().view(torch.int32))


def test_views_are_widened_and_left_as_they_are() -> None:
    q = CODES[:120].view(torch.float8_e4m3fn).view(10, 12)[1::2, :7].T
    before = q.clone()
    torch.testing.assert_close(widened(q), q.float(), rtol=0, atol=0)
    assert torch.equal(q.view(torch.uint8), before.view(torch.uint8))
    assert widened(q[:0]).shape == (0, 5)
