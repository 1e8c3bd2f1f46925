"""plan --search --plot: layouts by speed and memory, as an image or a page."""

from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from modelspec.cli.options import PNG_SIGN, write

if TYPE_CHECKING:
    from modelspec.plan.search import Search


def draw_search(result: "Search", file: Path) -> None:
    """Draws a search whose front is not empty into a .png, or a page of .html."""
    from modelspec.picture import palette
    from modelspec.picture.search import ACROSS, UP, chart, page, place

    if file.suffix == ".html":
        write(page(result), file, "--plot")
        return
    # Slow to import, and of no use to whoever does not draw.
    from matplotlib.figure import Figure

    drawn, theme = chart(result), palette.LIGHT
    figure = Figure(figsize=(9, 5), dpi=150, layout="constrained")
    title = f"{result.name}: {result.fitting:,} layouts that fit {result.world_size:,} {result.hardware}"
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    axes = figure.add_subplot()
    axes.plot(*zip(*drawn.dots, strict=True), "o", color=theme["rest-1"], markersize=2, label="fit, at most so fast")
    axes.plot(*zip(*drawn.front, strict=True), "o-", color=theme["attention-0"], markersize=4, label="front")
    for one, shade, word in ((result.own, "dense-0", "the spec's own"), (result.chosen, "experts-0", "chosen")):
        if one is not None and one.memory_bytes <= result.device_bytes:
            axes.plot(*place(one), "o", color=theme[shade], markersize=9, label=word)
    axes.axhline(drawn.device, color=theme["gone"], linestyle=(0, (6, 4)), linewidth=1, label="memory of the device")
    axes.set_xlim(0, drawn.width)
    axes.set_ylim(0, drawn.height)
    axes.set_xlabel(ACROSS, color=theme["soft"])
    axes.set_ylabel(UP, color=theme["soft"])
    axes.grid(color=theme["line"], linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=theme["soft"], length=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color(theme["line"])
    figure.legend(frameon=False, loc="outside lower left", ncols=5)
    image = BytesIO()
    figure.savefig(image, format="png", metadata={"Software": PNG_SIGN})
    write(image.getvalue(), file, "--plot")
