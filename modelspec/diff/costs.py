"""What a side of a diff takes to train, by its plan."""

from dataclasses import dataclass

from modelspec.checks import check
from modelspec.hardware.calibration import calibration
from modelspec.plan.memory import StageMemory, stage_memory
from modelspec.plan.step import speed
from modelspec.plan.training import stages_of_training, training
from modelspec.schema import ModelSpec
from modelspec.schema.hardware import Hardware


@dataclass(frozen=True, slots=True)
class Training:
    """The heaviest rank of the stage that needs most, GPU hours, and US dollars where the hardware has a price."""

    memory: StageMemory
    gpu_hours: float
    usd: float | None


def planned_both(old: ModelSpec, new: ModelSpec, hardware: Hardware) -> tuple[Training, Training] | None:
    """What training takes on both sides; None where one has no training, or no plan can be made of it."""
    if old.training is None or new.training is None:
        return None
    was = planned_training(old, hardware)
    now = was if old == new else was and planned_training(new, hardware)
    return (was, now) if was and now else None


def planned_training(spec: ModelSpec, hardware: Hardware) -> Training | None:
    """What training takes; None for a spec without it, or of which no plan can be made."""
    if spec.training is None or any(finding.severity == "error" for finding in check(spec)):
        return None
    try:
        whole = training(spec, hardware, speed(calibration(), hardware))
        stages = (stage_memory(applied, stage, hardware) for applied, stage in stages_of_training(spec))
        memory = max(stages, key=lambda each: each.total)
    except (ValueError, ArithmeticError, LookupError, AssertionError):
        # A diff is about more than this.
        return None
    assert whole.gpu_hours is not None, "a spec with training has a length"
    return Training(memory, whole.gpu_hours, whole.cost_usd)
