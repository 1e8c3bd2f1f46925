"""The folder of a run: what is in it, who may write there, and how a run finds its place again.

    runs/NAME/
      spec.yaml         the resolved spec; its first line holds the SHA-256 of the rest
      tokenizer.json
      metrics.jsonl     one line per step, and one per evaluation
      checkpoints/step-N/
      loss.png
      logs/rank-N.log   of several processes: what the others than rank 0 said, and stacks

Only one process writes into a run at a time: it holds a lock on the folder, which the system drops when it dies.
"""

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from modelspec import schema
from modelspec.builders.errors import EnvironmentFailed, Misuse, Refused
from modelspec.builders.events import Evaluated, FP8Shares, HeldAgainst, StepDone
from modelspec.builders.files import discard, disk, is_temporary, sweep, write_text
from modelspec.diff import Change, diff
from modelspec.dump import digest, dump
from modelspec.resolve import resolve

_SHA256 = "# sha256: "
_STEP, _EVALUATION, _HELD, _FP8 = (
    {field.name for field in fields(row)} - {"fp8"} for row in (StepDone, Evaluated, HeldAgainst, FP8Shares)
)
_ROWS = [_STEP, _STEP | _HELD, _STEP | _FP8, _STEP | _HELD | _FP8, _EVALUATION]


@dataclass(frozen=True, slots=True)
class Run:
    """An open run: `out` is its folder, `earlier` the spec that it was last trained with, None for a new one."""

    out: Path
    earlier: schema.ModelSpec | None = None

    @property
    def spec(self) -> Path:
        return self.out / "spec.yaml"

    @property
    def tokenizer(self) -> Path:
        return self.out / "tokenizer.json"

    @property
    def metrics(self) -> Path:
        return self.out / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.out / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        return self.out / "tensorboard"

    @property
    def logs(self) -> Path:
        return self.out / "logs"

    @property
    def plot(self) -> Path:
        return self.out / "loss.png"

    def begin(self, spec: schema.ModelSpec, tokenizer_json: str, step: int, *, overwrite: bool) -> None:
        """Makes the folder that of a run of `spec` after `step` steps. Deletes an earlier run if `overwrite`."""
        if overwrite:
            self._delete()
        # The mark that the folder is ours comes first: whatever follows a kill may be resumed or overwritten.
        write_text(self.spec, marked(spec))
        write_text(self.tokenizer, tokenizer_json)
        write_text(self.metrics, "".join(json.dumps(row) + "\n" for row in self.rows() if row["step"] <= step))
        sweep(self.out)
        sweep(self.checkpoints)

    def _delete(self) -> None:
        """Deletes what a run writes, except spec.yaml, and nothing else that may stand beside it."""
        with disk(self.out):
            for path in self.checkpoints.glob("step-*"):
                discard(path)
            written = (*self.tensorboard.glob("events.out.tfevents.*"), *self.logs.glob("rank-*.log"))
            for path in (self.metrics, self.plot, *written):
                path.unlink(missing_ok=True)

    def log(self, event: StepDone | Evaluated, held: HeldAgainst | None = None) -> None:
        """Adds a line to metrics.jsonl; what is not finite becomes null. Raises EnvironmentFailed."""
        numbers = asdict(event) | (asdict(held) if held else {})
        numbers |= numbers.pop("fp8", None) or {}
        row = {key: _finite(value) for key, value in numbers.items()}
        with disk(self.metrics), self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl that `log` wrote, without one that a kill cut short.

        Raises EnvironmentFailed where the file cannot be read.
        """
        try:
            text = self.metrics.read_text("utf-8", errors="replace")
        except FileNotFoundError:
            return []
        except OSError as error:
            raise EnvironmentFailed(f"cannot read {self.metrics}: {error.strerror}") from error
        return [row for line in text.splitlines() if (row := _row(line)) is not None]


def _row(line: str) -> dict[str, Any] | None:
    """The line as an event's numbers by name; None where it is no line of ours."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    ours = isinstance(row, dict) and row.keys() in _ROWS
    return row if ours and all(value is None or isinstance(value, int | float) for value in row.values()) else None


@contextmanager
def opened(out: Path, *, resume: bool, overwrite: bool) -> Iterator[Run]:
    """The run in a folder, held against other processes while the block runs; nothing in it is changed.

    Raises Misuse where the folder is in use, is not empty, or is not a run's, and EnvironmentFailed where it cannot be
    made.
    """
    if resume and overwrite:
        raise Misuse("--resume and --overwrite exclude each other")
    with disk(out):
        if out.exists() and not out.is_dir():
            raise Misuse(f"{out} is a file; the output of a run is a folder")
        out.mkdir(parents=True, exist_ok=True)
        if not os.access(out, os.W_OK | os.X_OK):
            raise EnvironmentFailed(f"cannot write {out}: permission denied")
    with _locked(out):
        if all(is_temporary(path) for path in out.iterdir()):
            yield Run(out)
            return
        if not (resume or overwrite):
            raise Misuse(f"{out} is not empty: --resume goes on with the run there, --overwrite starts it again")
        text = _content(out / "spec.yaml")
        if text is None:
            raise Misuse(f"{out} is not empty and holds no run: there is no spec.yaml written by a run")
        yield Run(out, earlier=None if overwrite else _earlier(out / "spec.yaml", text))


def marked(spec: schema.ModelSpec) -> str:
    """The text of spec.yaml: the spec below a comment with the SHA-256 of what follows it."""
    text = dump(spec)
    return f"{_SHA256}{digest(text)}\n{text}"


def read_spec(path: Path) -> schema.ModelSpec:
    """The spec that a run or checkpoint keeps. Raises SpecError."""
    return schema.ModelSpec.model_validate(resolve(path).data())


def require_compatible(earlier: schema.ModelSpec, spec: schema.ModelSpec, *, allow_changed: bool) -> None:
    """Raises Refused where a run of `earlier` must not go on with `spec`."""
    changes = diff(earlier, spec)
    breaking = [change for change in changes if change.change_class == "checkpoint-breaking"]
    if breaking:
        raise Refused(
            "the run's checkpoints do not fit the changed spec; train it in another folder, or --overwrite\n"
            + _listed(breaking)
        )
    grave = [change for change in changes if change.change_class in ("convergence", "precision")]
    if grave and not allow_changed:
        raise Refused(
            "the run was trained with another spec; --allow-changed goes on with the new one\n" + _listed(grave)
        )


def _listed(changes: list[Change]) -> str:
    shown = [f"  {c.path}: {c.before!r} -> {c.after!r} ({c.change_class})" for c in changes[:10]]
    return "\n".join([*shown, *([f"  and {len(changes) - 10} more"] if len(changes) > 10 else [])])


def _content(path: Path) -> str | None:
    """The text of a spec.yaml below its mark; None where there is no mark."""
    try:
        first, _, rest = path.read_text("utf-8").partition("\n")
    except (OSError, UnicodeDecodeError):
        return None
    return rest if first.startswith(_SHA256) else None


def _earlier(path: Path, content: str) -> schema.ModelSpec:
    stated = path.read_text("utf-8").partition("\n")[0].removeprefix(_SHA256)
    if digest(content) != stated:
        raise Misuse(
            f"{path} was edited: it does not match the SHA-256 in its first line; give changes as --set instead"
        )
    return read_spec(path)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        import fcntl
    except ImportError:  # Windows: no lock.
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Misuse(f"{folder} is in use: another process trains there") from error
        except OSError:  # Some network file systems have no locks.
            pass
        yield
    finally:
        os.close(descriptor)
