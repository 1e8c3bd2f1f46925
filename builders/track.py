"""TensorBoard: the same numbers as metrics.jsonl, as events for those who watch many runs side by side."""

from dataclasses import asdict
from typing import Any

from modelspec.builders.errors import EnvironmentFailed
from modelspec.builders.events import Evaluated, Event, Finished, Started, StepDone
from modelspec.builders.files import disk


class TensorBoard:
    """An observer that writes events into the run's tensorboard/; a resumed run replaces what came after its step.

    Raises EnvironmentFailed where tensorboard is not installed or its folder cannot be made.
    """

    def __init__(self) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise EnvironmentFailed(
                "--tensorboard needs the package tensorboard: pip install 'modelspec[track]'"
            ) from error
        self._open = SummaryWriter
        self._writer: SummaryWriter | None = None

    def __call__(self, event: Event) -> None:
        match event:
            case Started(out=out, first_step=first_step):
                folder = out / "tensorboard"
                with disk(folder):
                    self._writer = self._open(str(folder), purge_step=first_step + 1)
            case StepDone():
                self._add(
                    event.step,
                    {
                        "train/loss": event.loss,
                        "train/lm_loss": event.lm_loss,
                        "train/mtp_loss": event.mtp_loss,
                        "train/balance_loss": event.balance_loss,
                        "train/grad_norm": event.grad_norm,
                        "train/learning_rate": event.learning_rate,
                        "train/expert_load": event.expert_load,
                        "train/tokens_per_second": event.tokens_per_second,
                        **_fp8(event),
                    },
                )
            case Evaluated():
                self._add(
                    event.step,
                    {"validation/loss": event.val_loss, "validation/bits_per_byte": event.val_bits_per_byte},
                )
            case Finished():
                self.close()
            case _:
                pass

    def close(self) -> None:
        """Writes what is still in memory."""
        if self._writer is not None:
            self._writer.close()

    def _add(self, step: int, scalars: dict[str, Any]) -> None:
        assert self._writer is not None, "Started comes first"
        for name, value in scalars.items():
            if value is not None:
                self._writer.add_scalar(name, value, step)


def _fp8(event: StepDone) -> dict[str, float]:
    shares = {} if event.fp8 is None else asdict(event.fp8)
    return {f"fp8/{name.removeprefix('fp8_')}": share for name, share in shares.items()}
