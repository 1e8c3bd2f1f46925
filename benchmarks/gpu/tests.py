"""Runs tests/gpu without pytest, which a lent machine may lack: plain functions that take `device` and `large`."""

import runpy
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu.timing import Place, poisoned
from modelspec.kernels.op import use

FOLDER = Path(__file__).parents[2] / "tests" / "gpu"


def results(place: Place) -> Iterator[dict[str, Any]]:
    """A row for each test."""
    for file in sorted(FOLDER.glob("test_*.py")):
        try:
            found = runpy.run_path(str(file))
        except Exception as exception:
            yield {"operation": file.stem, "ours": True, "failed": f"{type(exception).__name__}: {exception}"}
            continue
        for name, test in found.items():
            if not name.startswith("test_"):
                continue
            row: dict[str, Any] = {"operation": f"{file.stem}.{name}", "ours": True}
            started = time.perf_counter()
            try:
                with use("triton"), poisoned():
                    test(place.device, not place.dry)
                row["passed"] = True
            except Exception as exception:
                row["failed"] = f"{type(exception).__name__}: {exception}".strip()[:500]
            yield row | {"took": time.perf_counter() - started}
