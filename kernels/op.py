"""An operation with two forms: a plain torch reference that defines it, and a faster one where that applies.

    rms_norm = Op(reference=..., fast=..., applies=on_cpu)
    y = rms_norm(x, weight, eps)            # the one dispatch rule
    with use("reference"): ...              # override, for tests and for bisecting a difference

The fast forms here are for eager mode on CPU: they save passes over memory, and the activations that autograd would
keep. Under torch.compile, on the meta device, for fake tensors and for distributed ones the reference runs, which the
compiler fuses by itself.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Generic, Literal, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

P = ParamSpec("P")
R = TypeVar("R")

Form = Literal["fastest", "reference", "triton"]
_FORM: ContextVar[Form] = ContextVar("form", default="fastest")


def form() -> Form:
    """The form that is chosen here."""
    return _FORM.get()


@contextmanager
def use(form: Form) -> Iterator[None]:
    """Chooses the form of every op inside the block; "triton" is "fastest" for ops without a Triton kernel."""
    token = _FORM.set(form)
    try:
        yield
    finally:
        _FORM.reset(token)


def on_cpu(*tensors: object) -> bool:
    """Whether the tensors among the arguments are ordinary FP32 or float64 tensors on CPU, all of one dtype."""
    found = [tensor for tensor in tensors if isinstance(tensor, Tensor) and tensor.is_floating_point()]
    return all(
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.device.type == "cpu"
        and tensor.dtype in (torch.float32, torch.float64)
        and tensor.dtype == found[0].dtype
        for tensor in found
    )


@dataclass(frozen=True)
class Op(Generic[P, R]):
    """A reference and a faster form with the same signature, and when the faster one may run."""

    reference: Callable[P, R]
    fast: Callable[P, R]
    applies: Callable[..., bool]

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        # First, since the compiler cannot trace a context variable.
        if torch.compiler.is_compiling():
            return self.reference(*args, **kwargs)
        if form() != "reference" and self.applies(*args, *kwargs.values()):
            return self.fast(*args, **kwargs)
        return self.reference(*args, **kwargs)
