"""Initial values.

Every matrix is drawn from a normal distribution; norms begin as doing nothing, biases as 0, and a recurrence's decay
rates over three orders of magnitude. The generator of a parameter is seeded by a hash of the run's seed and the
parameter's name, and of the expert's index in stacked experts. So a value does not depend on what else is built, in
which order, or on how the model is laid out over devices.
"""

from collections.abc import Iterator
from hashlib import sha256
from typing import assert_never

import torch
from torch import Tensor, nn

from modelspec import schema


def initialize(model: nn.Module, tensors: schema.Tensors, std: float, seed: int) -> None:
    """Fills all parameters and persistent buffers in place as their table says. Draws on CPU in FP32, then casts."""
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for name, spec in tensors.items():
            tensor = state[name]
            if tensor.is_meta:
                continue
            places = [tensor] if spec.experts_per_token is None else tensor
            for place, value in zip(places, initial_values(name, spec, std, seed), strict=True):
                place.copy_(value)


def initial_values(
    name: str, spec: schema.TensorSpec, std: float, seed: int, experts: range | None = None
) -> Iterator[Tensor]:
    """What a tensor begins with, FP32 on the CPU: the whole tensor, or of stacked experts one after the other.

    `experts` are those that are wanted, all of them if left out.
    """
    if spec.experts_per_token is None:
        yield _drawn(name, spec.shape, spec, std, seed)
    else:
        for index in range(spec.shape[0]) if experts is None else experts:
            yield _drawn(f"{name}.{index}", spec.shape[1:], spec, std, seed)


def _drawn(name: str, shape: tuple[int, ...], spec: schema.TensorSpec, std: float, seed: int) -> Tensor:
    match spec.initial:
        case "ones":
            return torch.ones(shape)
        case "zeros":
            return torch.zeros(shape)
        case "normal":
            return _empty(shape).normal_(0.0, std, generator=_generator(name, seed))
        case "log_of_uniform":
            return _empty(shape).uniform_(0.01, 16.0, generator=_generator(name, seed)).log_()
        case _:
            assert_never(spec.initial)


def _empty(shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def _generator(name: str, seed: int) -> torch.Generator:
    digest = sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
