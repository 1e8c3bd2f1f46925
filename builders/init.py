"""Initial values.

Every matrix is drawn from a normal distribution, every norm weight is 1, every selection bias 0. The generator of a
parameter is seeded by a hash of the run's seed and the parameter's name, and of the expert's index in stacked experts.
So a value does not depend on what else is built, in which order, or on how the model is laid out over devices.
"""

from hashlib import sha256

import torch
from torch import Tensor, nn

from modelspec.builders.ffn.moe import Experts


def initialize(model: nn.Module, std: float, seed: int) -> None:
    """Fills all parameters and persistent buffers in place. Draws on CPU in FP32, then casts."""
    stacked = {name for name, module in model.named_modules() if isinstance(module, Experts)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.is_meta:
                continue
            if parameter.ndim == 1:
                parameter.fill_(1.0)
            elif name.rpartition(".")[0] in stacked:
                for index, expert in enumerate(parameter):
                    expert.copy_(_normal(f"{name}.{index}", expert.shape, std, seed))
            else:
                parameter.copy_(_normal(name, parameter.shape, std, seed))
        for buffer in model.buffers():
            if not buffer.is_meta:
                buffer.zero_()


def _normal(name: str, shape: torch.Size, std: float, seed: int) -> Tensor:
    digest = sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.empty(shape, dtype=torch.float32, device="cpu").normal_(0.0, std, generator=generator)
