"""An operation with a Triton kernel, registered with torch: one value that carries all of its forms.

    quantize = TritonOp("quantize", reference=..., launch=..., fake=...)
    q, scales = quantize(x)                 # the one dispatch rule: the kernel on a GPU with FP8, else the reference
    with use("reference"): ...              # override, for tests and for bisecting a difference
    with use("triton"): ...                 # the kernel also on CPU, in Triton's interpreter

The reference is plain torch and defines the operation. The kernel computes the same in fewer passes over memory. torch
sees one operator: `fake` gives the shapes of its results, so that torch.compile, the meta device and fake tensors know
it without looking inside; `check` says what all of them ask of the arguments. Operations with a gradient say it through
`gradient`, as `torch.library.register_autograd` takes it; in the backward pass the override of the forward pass holds.
"""

from collections.abc import Callable, Iterable
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor

from modelspec.kernels.device import has_fp8
from modelspec.kernels.op import Form, form, use
from modelspec.kernels.triton_language import HAS_TRITON

P = ParamSpec("P")
R = TypeVar("R")


def runs_triton(tensors: Iterable[object]) -> bool:
    """Whether the kernel runs for such arguments: on a GPU that has FP8, or wherever it is asked for by `use`."""
    match form():
        case "reference":
            return False
        case "triton":
            return True
        case "fastest":
            return HAS_TRITON and any(isinstance(each, Tensor) and has_fp8(each.device) for each in tensors)


class TritonOp(Generic[P, R]):
    """A reference, a launcher of kernels with the same signature, and the shapes of what both return.

    The signature's annotations are torch's: Tensor, int, float, bool, str, dtype, and optional ones or lists of them.
    `mutates` names arguments that are written to. `launch` is called with tensors of one device, which is the current
    one meanwhile; it must write every element of what it returns. `check` raises ValueError for arguments that are
    not the operation's, from shapes and dtypes alone: before either form, and for tensors without values.
    """

    def __init__(
        self,
        name: str,
        reference: Callable[P, R],
        launch: Callable[P, R],
        fake: Callable[P, R],
        mutates: tuple[str, ...] = (),
        check: Callable[P, None] | None = None,
    ) -> None:
        self.name = name
        self.reference = reference
        self.launch = launch

        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            if check is not None:
                check(*args, **kwargs)
            every = (*args, *kwargs.values())
            if not runs_triton(every):
                return reference(*args, **kwargs)
            # Triton launches on the current device, whichever the tensors are on.
            with torch.cuda.device_of(next(each for each in every if isinstance(each, Tensor))):
                return launch(*args, **kwargs)

        def shapes(*args: P.args, **kwargs: P.kwargs) -> R:
            if check is not None:
                check(*args, **kwargs)
            return fake(*args, **kwargs)

        schema = torch.library.infer_schema(reference, mutates_args=mutates)
        self.registered = torch.library.custom_op(f"modelspec::{name}", run, mutates_args=mutates, schema=schema)
        self.registered.register_fake(shapes)

    def gradient(self, backward: Callable[..., tuple[Tensor | None, ...]], setup_context: Callable[..., None]) -> None:
        """Makes the operation differentiable; signatures as of `torch.library.register_autograd`."""

        def remember(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            # The backward pass may run in a thread of autograd's, which has no override of its own.
            ctx.form = form()
            setup_context(ctx, inputs, output)

        def again(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
            chosen: Form = ctx.form
            with use(chosen):
                return backward(ctx, *grads)

        self.registered.register_autograd(again, setup_context=remember)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        result: R = self.registered(*args, **kwargs)
        return result
