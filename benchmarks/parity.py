"""Every layout of tests/builders/parallel/layouts.py against one process: `make parity`.

    python -m benchmarks.parity [--world 4 8]

The largest relative differences of losses, of the gradient's norm, of gradients by name and of weights after three
steps of plain gradient descent, in FP32. Writes benchmarks/results/parity.json; exits 1 where a layout fails.
"""

import argparse
import json
import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.builders.parallel.layouts import EIGHT, FOUR
from tests.builders.parallel.ranks import run_ranks
from tests.builders.parallel.test_parity import hold_layouts

RESULT = Path(__file__).parent / "results" / "parity.json"
WORLDS = {4: FOUR, 8: EIGHT}


def main() -> int:
    """Runs the layouts of each world in one launch."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--world", type=int, nargs="+", choices=WORLDS, default=list(WORLDS))
    found: dict[str, Any] = {}
    for world in parser.parse_args().world:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "found.json"
            run_ranks(hold_layouts, world, WORLDS[world], file, timeout=1800)
            found |= {f"{world} ranks: {name}": result for name, result in json.loads(file.read_text()).items()}
    for name, result in found.items():
        told = ", ".join(f"{key} {value:.1e}" for key, value in result.items()) if isinstance(result, dict) else result
        print(f"{name:60} {told}")
    machine = {"cores": os.cpu_count(), "torch": version("torch"), "command": "python -m benchmarks.parity"}
    RESULT.write_text(json.dumps({"machine": machine, "largest_relative_difference": found}, indent=1) + "\n")
    return int(not all(isinstance(result, dict) for result in found.values()))


if __name__ == "__main__":
    sys.exit(main())
