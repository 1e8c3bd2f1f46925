"""Which device is meant by a name, whether it is there, and how much of its memory is used."""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

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


def require_memory(name: str | torch.device) -> torch.device:
    """As `require_device`, for one that holds values. Raises Misuse for meta."""
    device = require_device(name)
    if device.type == "meta":
        raise Misuse("the device meta holds no values: nothing is trained there; cpu and cuda are devices that do")
    return device


@contextmanager
def computing(deterministic: bool) -> Iterator[None]:
    """While the block runs: no operation whose result depends on scheduling, if wanted; no memory is a clear error."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(deterministic or before)
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        full = isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
        if not full:
            raise
        raise EnvironmentFailed(
            f"out of memory: {str(error).splitlines()[0]}\n  help: a smaller parallelism.microbatch_size needs less"
        ) from error
    finally:
        torch.use_deterministic_algorithms(before)


def forget_peak_memory(device: torch.device) -> None:
    """Lets `peak_memory` count from now, where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """The most bytes held: by torch's tensors on a GPU, by the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # A child's ru_maxrss begins with what its parent held.
    with suppress(OSError):
        if found := re.search(r"^VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE):
            return int(found[1]) * 1024
    import resource  # Not on every platform.

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
