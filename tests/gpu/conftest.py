"""Tests of compiled kernels on the GPU at hand. `make gpu` runs them, without pytest; by pytest they run like this:

    pytest tests/gpu --confcutdir tests/gpu

Each takes the device and whether shapes may be large. A dry run of `make gpu` passes the CPU and small shapes, so that
the interpreter has seen every line of them before a GPU does. Among the other tests they are passed over, for there
Triton interprets.
"""

import os

import pytest
import torch


@pytest.fixture
def device() -> torch.device:
    """The GPU; without one that compiles, the test is passed over."""
    if not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("needs a GPU, and kernels that are compiled")
    return torch.device("cuda")


@pytest.fixture
def large() -> bool:
    """Shapes as models have them."""
    return True
