"""loss.png: the run at a glance, and the line that it must fall below."""

from collections.abc import Sequence
from io import BytesIO
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelspec.builders.files import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TRAIN, _MTP, _VALIDATION, _BASELINE, _INK, _FAINT = "#2f6fde", "#e08a1e", "#16181d", "#b3261e", "#3b3f46", "#d9dce1"


def write_plot(path: Path, title: str, rows: Sequence[dict[str, Any]]) -> None:
    """Draws the lines of metrics.jsonl; nothing where no step has a loss. Raises EnvironmentFailed for a bad disk."""
    steps = [row for row in rows if row.get("lm_loss") is not None]
    if not steps:
        return
    # Slow to import, and of no use to whoever does not draw.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 4.8), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    _draw(axes, steps, [row for row in rows if row.get("val_loss") is not None])
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", color=_INK, pad=12)
    image = BytesIO()
    figure.savefig(image, format="png")
    write_bytes(path, image.getvalue())


def _draw(axes: "Axes", steps: Sequence[dict[str, Any]], evaluations: Sequence[dict[str, Any]]) -> None:
    x = [row["step"] for row in steps]
    train = [row["lm_loss"] for row in steps]
    axes.plot(x, train, color=_TRAIN, alpha=0.25, linewidth=0.8)
    smooth = _smoothed(train)
    axes.plot(x, smooth, color=_TRAIN, linewidth=1.8, label="training")
    lowest, highest = min(train), max(train)
    if mtp := [(row["step"], row["mtp_loss"]) for row in steps if row.get("mtp_loss") is not None]:
        line = _smoothed([loss for _, loss in mtp])
        axes.plot([step for step, _ in mtp], line, color=_MTP, linewidth=1.4, label="multi-token prediction")
        highest = max(highest, *line)
    if evaluations:
        points = [row["val_loss"] for row in evaluations]
        axes.plot(
            [row["step"] for row in evaluations],
            points,
            color=_VALIDATION,
            linewidth=0,
            marker="o",
            markersize=5,
            markeredgecolor="white",
            markeredgewidth=1.0,
            zorder=4,
            label=f"validation, {points[-1]:.2f} at the end",
        )
        lowest = min(lowest, *points)
        if (unigram := evaluations[-1].get("unigram_loss")) is not None:
            axes.axhline(
                unigram, color=_BASELINE, linewidth=1.2, linestyle=(0, (5, 3)), label=f"unigram, {unigram:.2f}"
            )
            highest = max(highest, unigram)
    margin = 0.06 * (highest - lowest) or 1.0  # One step alone has no height.
    axes.set_ylim(lowest - margin, highest + margin)
    axes.set_xlim(0, max(x[-1], 1) * 1.01)
    axes.set_xlabel("step", color=_INK)
    axes.set_ylabel("loss, nats per token", color=_INK)
    axes.grid(axis="y", color=_FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_INK, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_FAINT)
    axes.legend(frameon=False, labelcolor=_INK, loc="upper right")


def _smoothed(values: Sequence[float]) -> list[float]:
    """Mean over a fortieth of the run to either side, so that the line does not lag behind."""
    reach = len(values) // 40
    sums = [0.0, *accumulate(values)]
    spans = [(max(at - reach, 0), min(at + reach + 1, len(values))) for at in range(len(values))]
    return [(sums[end] - sums[start]) / (end - start) for start, end in spans]
