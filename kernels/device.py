"""What a device can do, of what kernels need."""

from functools import cache

import torch


@cache
def has_fp8(device: torch.device) -> bool:
    """Whether a device multiplies matrices in FP8, and the kernels here are made for it.

    These are NVIDIA's data-centre GPUs of compute capability 9 and 10 (Hopper, Blackwell) and AMD's CDNA 3 and 4.
    """
    if device.type != "cuda":
        return False
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.startswith(("gfx94", "gfx95"))
    return torch.cuda.get_device_capability(device)[0] in (9, 10)
