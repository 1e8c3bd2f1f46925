"""What the present machine really does: rates of products, bandwidth of memory, and steps of a spec.

A plan is arithmetic over what a vendor promises. Here the same step runs: the model and the optimizer that `train` has,
on random tokens, which load experts evenly. One step warms up and is not counted.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Literal

import torch

from modelspec import schema
from modelspec.amount import amount_of_bytes
from modelspec.builders.device import computing, forget_peak_memory, peak_memory, require_device
from modelspec.builders.errors import EnvironmentFailed, Refused
from modelspec.builders.learner import Learner
from modelspec.builders.requirements import Unsupported, require_world, unsupported
from modelspec.environment import usable_memory
from modelspec.hardware import Hardware, load, names
from modelspec.kernels.linear import matmul_nt
from modelspec.plan.ranks import Batch, RankMemory, rank_memory
from modelspec.plan.training import stages_of_training
from modelspec.schema.hardware import PeakFlops, Reference
from modelspec.timeline import timeline

# Of a machine that says nothing of it: a processor of a server, and a GPU of one; watts.
POWER = {"cpu": 200.0, "gpu": 700.0}
# Of links that nobody measures here: one process has nobody to talk to. Bytes per second.
_LINK, _NETWORK = 10e9, 1e9
# Edge of the square matrices that are multiplied, and bytes that are copied: past every cache, and done in a moment.
_EDGE = {"cpu": 2048, "gpu": 8192}
_COPIED = {"cpu": 2**28, "gpu": 2**31}
_TIMES = 5


@dataclass(frozen=True, slots=True)
class Measured:
    """Steps of one spec: `seconds` of each after the first, `warm_up` that of the first; `tokens` of a step.

    `memory` is the most that was held, in bytes: by the process on a CPU, by tensors on a GPU.
    """

    device: str
    sequence_length: int
    batch_size: int
    warm_up: float
    seconds: tuple[float, ...]
    memory: int

    @property
    def tokens(self) -> int:
        """Tokens of one step."""
        return self.sequence_length * self.batch_size

    @property
    def step(self) -> float:
        """Seconds of a step: the middle one, which another program's work on the machine moves least."""
        return median(self.seconds)


def measured(
    spec: schema.ModelSpec,
    batch_size: int,
    *,
    steps: int,
    device: str,
    check: Callable[[], None] = lambda: None,
) -> Measured:
    """Takes steps of the first stage of training, with so many sequences in each; `check` is called between them.

    A spec without training gets the stage that its plan assumes. Raises Refused, Misuse or EnvironmentFailed.
    """
    require_measurable(spec)
    target = require_device(device)
    whole = spec if spec.training is not None else _assumed(spec)
    assert whole.training is not None
    first = replace(next(timeline(whole.training)), batch_size=batch_size)
    draw = torch.Generator().manual_seed(whole.training.seed)
    seconds = []
    with computing(whole.training.deterministic):
        forget_peak_memory(target)
        learner = Learner(whole, whole.training, target)
        for _ in range(1 + steps):
            check()
            shape = (batch_size, first.sequence_length + 1)
            seconds.append(learner.step(first, torch.randint(spec.model.vocab_size, shape, generator=draw)).seconds)
        held = peak_memory(target)
    return Measured(device_name(target), first.sequence_length, batch_size, seconds[0], tuple(seconds[1:]), held)


def require_measurable(spec: schema.ModelSpec) -> None:
    """Raises Refused where this version takes no step of a spec, Misuse for a launcher's other world."""
    require_world(spec)
    # Text and recipe need not be there.
    found = [each for each in unsupported(spec) if each.path.partition(".")[0] not in ("data", "training")]
    if (world := spec.parallelism.world_size) > 1:
        remedy = "set parallelism=null, and parallelism=null in each stage that has it"
        found.append(Unsupported("parallelism.world_size", f"{world} processes: steps are measured on one", remedy))
    if found:
        raise Refused(f"{spec.name} cannot be measured as it stands\n" + "\n".join(map(str, found)))


def require_room(name: str, planned: RankMemory, device: str) -> None:
    """Raises EnvironmentFailed where the plan of a step needs more memory than is free now."""
    free = free_memory(require_device(device))
    if planned.total <= free:
        return
    parts = {
        "weights": planned.weights + planned.fp8_copies + planned.master,
        "gradients": planned.gradients,
        "moments": planned.optimizer,
        "activations": planned.activations + planned.logits + planned.working,
        "margin": planned.margin,
    }
    told = ", ".join(f"{part} {amount_of_bytes(size)}" for part, size in parts.items())
    raise EnvironmentFailed(
        f"a step of {name} needs {amount_of_bytes(planned.total)} by its plan ({told}), "
        f"and {amount_of_bytes(free)} are free here: nothing was run\n"
        "  help: measure a smaller sibling, with fewer layers or a smaller batch by --set"
    )


def heaviest(spec: schema.ModelSpec, sequence_length: int, batch_size: int, hardware: Hardware) -> RankMemory:
    """The heaviest rank of a spec as it stands in one stage of training."""
    return max(rank_memory(spec, Batch(sequence_length, batch_size), hardware), key=lambda rank: rank.total)


def present(device: str) -> tuple[Hardware, bool]:
    """The machine that this is, and whether its peaks were measured now: a GPU that ships as hardware is known."""
    target = require_device(device)
    name = device_name(target)
    known = [each for each in names() if each in name.lower()]
    if target.type == "cuda" and known:
        return load(max(known, key=len)), False
    return _described(target, name, dict(rates(target)), bandwidth(target)), True


def rates(device: torch.device) -> Iterator[tuple[str, float]]:
    """FLOP/s of a product of large matrices in each format that models compute in."""
    edge = _EDGE[_kind(device)]
    for name in ("float64", "float32", "bfloat16"):
        left, right = (torch.rand(edge, edge, device=device).to(getattr(torch, name)) for _ in range(2))
        yield name, 2 * edge**3 / _fastest(partial(matmul_nt, left, right), device)


def bandwidth(device: torch.device) -> float:
    """Bytes per second between memory and processor, of a copy: what it reads and what it writes."""
    source = torch.ones(_COPIED[_kind(device)] // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _fastest(lambda: target.copy_(source), device)


def free_memory(device: torch.device) -> int:
    """Bytes that nobody uses now, so far as the system says it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        found = re.search(r"^MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    usable = usable_memory()
    return usable if found is None else min(usable, int(found[1]) * 1024)


def device_name(device: torch.device) -> str:
    """What the maker calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    threads = torch.get_num_threads()
    return f"{found[1].strip() if found else device.type}, {threads} thread{'s' if threads > 1 else ''}"


def _described(device: torch.device, name: str, rate: dict[str, float], bytes_per_second: float) -> Hardware:
    kind = _kind(device)
    memory = torch.cuda.get_device_properties(device).total_memory if kind == "gpu" else usable_memory()
    today = date.today().isoformat()
    return Hardware(
        name="this-machine",
        summary=f"{name}, as modelspec plan --measure found it.",
        vendor=name.split()[0].rstrip(","),
        kind=kind,
        memory=memory,
        memory_bandwidth=_rounded(bytes_per_second),
        peak_flops=PeakFlops.model_validate({key: _rounded(value) for key, value in rate.items()}),
        gpus_per_node=1,
        fast_domain=1,
        node_bandwidth=min(_LINK, _rounded(bytes_per_second)),
        network_bandwidth=min(_NETWORK, _rounded(bytes_per_second)),
        power=POWER[kind],
        sources=(
            Reference(fields=("peak_flops", "memory", "memory_bandwidth"), text="measured here", date=today),
            Reference(
                fields=("power", "gpus_per_node", "fast_domain", "node_bandwidth", "network_bandwidth"),
                text="assumed, not measured: one device alone",
                date=today,
            ),
        ),
    )


def _kind(device: torch.device) -> Literal["gpu", "cpu"]:
    return "gpu" if device.type == "cuda" else "cpu"


def _assumed(spec: schema.ModelSpec) -> schema.ModelSpec:
    """The spec with the stage of training that its plan assumes."""
    _, stage = next(stages_of_training(spec))
    optimizer = {"type": "adamw", "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}
    training = schema.Training.model_validate({"optimizer": optimizer, "stages": [stage]})
    return spec.model_copy(update={"training": training})


def _fastest(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of a few runs."""
    seconds = []
    for _ in range(1 + _TIMES):
        _finish(device)
        began = perf_counter()
        run()
        _finish(device)
        seconds.append(perf_counter() - began)
    return min(seconds[1:])


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
