"""build: a spec becomes a model on one device."""

from dataclasses import dataclass

import torch

from modelspec import schema
from modelspec.builders.device import require_device
from modelspec.builders.fp8 import to_fp8, uncomputable
from modelspec.builders.init import initialize
from modelspec.builders.model import LossWeights, Transformer
from modelspec.timeline import timeline

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


class BuildError(Exception):
    """The spec is valid, but it cannot be computed as it says, or as the caller asks."""

    exit_code = 1


@dataclass(frozen=True, slots=True)
class _Dtypes:
    parameters: torch.dtype
    compute: torch.dtype
    router: torch.dtype


def _dtypes(precision: schema.Precision, dtype: torch.dtype | None) -> _Dtypes:
    if dtype is not None and dtype not in DTYPES.values():
        raise BuildError(f"dtype {dtype!r} is none that models are built in: {', '.join(map(str, DTYPES.values()))}")
    if dtype is None:
        return _Dtypes(DTYPES[precision.master_weights], DTYPES[precision.compute], DTYPES[precision.router])
    # Routing decides between close scores: it never runs below FP32 unless the spec says so.
    return _Dtypes(dtype, dtype, torch.promote_types(dtype, DTYPES[precision.router]))


def build(
    spec: schema.ModelSpec,
    *,
    device: str | torch.device = "cpu",
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> Transformer:
    """The model of a spec, initialised, on one device; `parallelism` is ignored.

    Parameters are in `precision.master_weights` and the computation in `precision.compute`; an explicit `dtype` wins
    over both and turns FP8 off. On the meta device any size builds and nothing is initialised.
    Raises BuildError for another dtype than float64, float32 and bfloat16, and as `require_fp8` does; Misuse for what
    is no device, EnvironmentFailed for one that is not there.
    """
    device = require_device(device)
    if dtype is None:
        require_fp8(spec, device)
    dtypes = _dtypes(spec.precision, dtype)
    with torch.device("meta"):
        model = Transformer(spec, dtypes.compute, dtypes.router)
    biases = torch.float64 if dtypes.parameters == torch.float64 else torch.float32
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(
                module, name, torch.nn.Parameter(torch.empty_like(parameter, dtype=dtypes.parameters, device=device))
            )
        for name, buffer in module.named_buffers(recurse=False):
            module.register_buffer(name, torch.empty_like(buffer, dtype=biases, device=device))
    initialize(model, spec.tensors(), spec.model.init.std, seed)
    if spec.precision.fp8 is not None and dtype is None:
        to_fp8(model, spec.precision.fp8)
    model.default_loss_weights = _loss_weights_at_start(spec.training)
    return model


def require_fp8(spec: schema.ModelSpec, device: torch.device) -> None:
    """Raises BuildError where a spec asks for FP8 that cannot be computed on a device, naming the layers."""
    if found := list(uncomputable(spec, device)):
        told = "\n".join(f"{path}: {message}\n  help: {help}" for path, message, help in found)
        raise BuildError(f"{spec.name} cannot be built as it says\n{told}")


def _loss_weights_at_start(training: schema.Training | None) -> LossWeights:
    if training is None:
        return LossWeights()
    first = next(timeline(training))
    return LossWeights(mtp=first.mtp_weight, balance=first.balance_weight)
