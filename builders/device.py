"""Which device is meant by a name, and whether it is there."""

import torch

from modelspec.builders.errors import EnvironmentFailed, Misuse


def require_device(name: str | torch.device) -> torch.device:
    """The device of a name. Raises Misuse for no name of one, EnvironmentFailed where it is not there."""
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise Misuse(f"{name!r} is no device; cpu, cuda and cuda:1 are") from error
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0] if str(error) else "not available"
        raise EnvironmentFailed(f"device {name}: {reason}") from error
    return device
