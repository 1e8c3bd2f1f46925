"""An operation with a kernel: which form runs, and on which device."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from modelspec.kernels.op import use
from modelspec.kernels.triton_op import TritonOp

RAN: list[str] = []


def _reference(scale: float, x: Tensor) -> Tensor:
    RAN.append("reference")
    return x * scale


def _launch(scale: float, x: Tensor) -> Tensor:
    RAN.append("kernel")
    return x * scale


def _fake(scale: float, x: Tensor) -> Tensor:
    return torch.empty_like(x)


scaled = TritonOp("scaled_in_a_test", _reference, _launch, _fake)


@pytest.fixture(autouse=True)
def devices(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Tensors whose device was made the current one."""
    entered: list[Tensor] = []

    @contextmanager
    def device_of(tensor: Tensor) -> Iterator[None]:
        entered.append(tensor)
        RAN.append("enter")
        yield
        RAN.append("leave")

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    RAN.clear()
    return entered


def test_a_kernel_is_launched_on_the_device_of_its_tensors(devices: list[Tensor]) -> None:
    x = torch.randn(3)
    with use("triton"):
        scaled(2.0, x)
    assert RAN == ["enter", "kernel", "leave"]
    assert [tensor.data_ptr() for tensor in devices] == [x.data_ptr()]


@pytest.mark.parametrize("form", ["reference", "fastest"])
def test_a_reference_runs_wherever_it_is(form: str) -> None:
    with use("reference" if form == "reference" else "fastest"):
        assert scaled(2.0, torch.ones(2)).tolist() == [2, 2]
    assert RAN == ["reference"]


def test_operands_without_a_gpu_change_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with use("triton"):
        scaled(2.0, torch.ones(2))
    assert RAN == ["kernel"]
