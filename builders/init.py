"""Initial values.

Every matrix is drawn from a normal distribution; norms begin as doing nothing, biases as 0. The generator of a
parameter is seeded by a hash of the run's seed and the parameter's name, and of the expert's index in stacked experts.
So a value does not depend on what else is built, in which order, or on how the model is laid out over devices.
"""

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
            match spec.initial:
                case "ones":
                    tensor.fill_(1.0)
                case "zeros":
                    tensor.zero_()
                case "normal" if spec.experts_per_token is not None:
                    for index, expert in enumerate(tensor):
                        expert.copy_(_normal(f"{name}.{index}", expert.shape, std, seed))
                case "normal":
                    tensor.copy_(_normal(name, tensor.shape, std, seed))
                case _:
                    assert_never(spec.initial)


def _normal(name: str, shape: torch.Size, std: float, seed: int) -> Tensor:
    digest = sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.empty(shape, dtype=torch.float32, device="cpu").normal_(0.0, std, generator=generator)
