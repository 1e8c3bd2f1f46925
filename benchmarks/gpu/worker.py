"""Runs sections in one process, and writes a line of JSON for each result as soon as it is there.

    python -m benchmarks.gpu.worker [--dry] FILE SECTION...

A kernel that fails can take the device from its process for good, and one that hangs never returns: `benchmarks.gpu`
starts a process for each section, ends it when its time is over, and reads what it wrote until then.
"""

import argparse
import importlib
import json
import os
import runpy
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
# Of each section, the module and the function that gives its cases.
SECTIONS = {
    "ceilings": ("ceilings", "cases"),
    "tests": ("tests", ""),
    "quantise": ("quantizers", "cases"),
    "dense": ("dense", "cases"),
    "grouped": ("grouped", "cases"),
    "moe": ("moe", "cases"),
    "configs": ("candidates", "cases"),
    "moves": ("moves", "cases"),
    "specialized": ("candidates", "specialized_cases"),
}


def rows(section: str, dry: bool) -> Iterator[dict[str, Any]]:
    """What a section finds out."""
    import torch

    from benchmarks.gpu.timing import Place, measured

    place = Place(torch.device("cpu" if dry else "cuda"), dry)
    module, function = SECTIONS[section]
    found = importlib.import_module(f"benchmarks.gpu.{module}")
    if section == "tests":
        yield from found.results(place)
        return
    for case in getattr(found, function)(place):
        yield from measured(case, place)


def machine() -> dict[str, Any]:
    """What the results belong to."""
    import torch
    import triton

    told: dict[str, Any] = {"torch": torch.__version__, "triton": triton.__version__, "device": "none"}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        told |= {"device": properties.name, "multiprocessors": properties.multi_processor_count}
        told |= {"memory": properties.total_memory, "l2": properties.L2_cache_size, "cuda": torch.version.cuda}
    return told


def main() -> None:
    """Parses the command line and runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("file", type=Path)
    parser.add_argument("sections", nargs="*", choices=SECTIONS)
    args = parser.parse_args()
    # Before anything imports a kernel: decorated later, it would be one of the other kind.
    os.environ["TRITON_INTERPRET"] = "1" if args.dry else "0"
    if args.dry:
        # The interpreter casts wrongly, and the tests know how to repair it.
        runpy.run_path(str(ROOT / "tests" / "kernels" / "conftest.py"))
    with args.file.open("a") as file:

        def write(row: dict[str, Any]) -> None:
            print(json.dumps(row), file=file, flush=True)

        write({"machine": machine()})
        for section in args.sections:
            try:
                for row in rows(section, args.dry):
                    write({"section": section, **row})
            except Exception as exception:
                traceback.print_exc()
                told = f"{type(exception).__name__}: {exception}".splitlines()[0][:300]
                write({"section": section, "operation": section, "ours": True, "failed": told})


if __name__ == "__main__":
    main()
