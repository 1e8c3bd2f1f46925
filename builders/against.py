"""A run beside its plan: step by step, and all together."""

import torch

from modelspec.builders.device import forget_peak_memory, peak_memory
from modelspec.builders.events import Compared, HeldAgainst, StepDone
from modelspec.plan.planned import Planned


class Against:
    """A plan, and this process's steps, which it is held against."""

    def __init__(self, planned: Planned, device: torch.device) -> None:
        self.planned, self.device = planned, device
        # Steps but the first: tokens, seconds, and the seconds that the plan gives them.
        self.steps = self.tokens = 0
        self.seconds = self.planned_seconds = 0.0
        self.memory = 0

    def begin(self) -> None:
        """Comes before each step: what evaluation and checkpoints held is no part of it."""
        forget_peak_memory(self.device)

    def step(self, done: StepDone, stage: int) -> HeldAgainst:
        """What the plan says of a step of a stage."""
        held = peak_memory(self.device)
        self.memory = max(self.memory, held)
        speed = self.planned.tokens_per_second[stage]
        self.steps += 1
        if self.steps > 1:
            tokens = round(done.seconds * done.tokens_per_second)
            self.tokens += tokens
            self.seconds += done.seconds
            self.planned_seconds += tokens / speed
        return HeldAgainst(speed, self.planned.memory_on(self.device.type), held)

    def all(self) -> Compared | None:
        """All steps together; None where only one warmed up."""
        if self.steps < 2:
            return None
        return Compared(
            hardware=self.planned.hardware,
            planned_tokens_per_second=self.tokens / self.planned_seconds,
            tokens_per_second=self.tokens / self.seconds,
            planned_memory=self.planned.memory_on(self.device.type),
            memory=self.memory,
        )
