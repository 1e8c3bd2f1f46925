"""Tests the kernels on a GPU and measures them beside what torch has, in one go.

    python -m benchmarks.gpu [--out DIR] [--seconds 520] [--sections NAME...]
    python -m benchmarks.gpu --dry

Writes DIR/h200-kernels.json and DIR/h200-configs.json, named after the device, and prints a table. What the time does
not suffice for is skipped, and said so. `--dry` runs all of it on CPU, with tiny shapes, in Triton's interpreter, and
times nothing: a mistake in these scripts shows before a GPU is at hand. Without a GPU a dry run is all there is.

Exit status: 0, 1 where something failed, 3 without a GPU, torch, triton or a folder to write to.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.gpu import report
from benchmarks.gpu.worker import ROOT, SECTIONS

# No section may take longer, in seconds: one that hangs must leave time for the others.
LONGEST = {"ceilings": 45, "tests": 150, "quantise": 60, "dense": 120, "grouped": 110, "moe": 70, "configs": 110}
LONGEST_OTHER = 60
# A process needs so many seconds before it finds out anything.
LEAST = 15


def unready(out: Path) -> str | None:
    """Why nothing can be measured or written, in one sentence: packages that this Python lacks, or the folder."""
    if lacking := [name for name in ("torch", "triton") if find_spec(name) is None]:
        return f"needs torch and triton: {sys.executable} lacks {' and '.join(lacking)}; name another with PYTHON=..."
    existing = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        return f"--out {out}: {existing} is no folder that can be written to"
    return None


def has_gpu() -> bool:
    """Whether torch finds one, asked in a process of its own: this one needs none."""
    found = subprocess.run([sys.executable, "-c", "import torch; exit(not torch.cuda.is_available())"], check=False)
    return found.returncode == 0


def run(sections: list[str], file: Path, seconds: float, dry: bool) -> str | None:
    """Runs sections in a process of their own; why they did not come to their end, if they did not."""
    command = [sys.executable, "-m", "benchmarks.gpu.worker", *["--dry"] * dry, str(file), *sections]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    if dry:
        environment["OMP_NUM_THREADS"] = "1"
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return f"ended after {seconds:.0f} seconds"
    return None if done.returncode == 0 else f"died with status {done.returncode}"


def read(file: Path) -> tuple[dict[str, Any], list[report.Row]]:
    """The machine, and the rows in order."""
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    machines = [line["machine"] for line in lines if "machine" in line]
    return machines[0] if machines else {}, [line for line in lines if "section" in line]


def dry_run(sections: list[str], folder: Path) -> int:
    """Everything once, without a GPU."""
    file = folder / "dry.jsonl"
    why = run(sections, file, 600, dry=True)
    _, rows = read(file)
    failed = report.failures(rows) + ([why] if why else [])
    print(f"dry run: {len(rows)} results in {len({row['section'] for row in rows})} sections, {len(failed)} failed")
    for line in failed:
        print(f"FAILED: {line}")
    return 1 if failed else 0


def full_run(sections: list[str], folder: Path, seconds: float) -> tuple[dict[str, Any], list[report.Row], list[str]]:
    """The machine, all rows, and what was skipped or cut."""
    started, file, cut = time.monotonic(), folder / "rows.jsonl", []
    for section in sections:
        left = seconds - (time.monotonic() - started)
        if left < LEAST:
            cut.append(f"{section}: skipped, the time was over")
            continue
        why = run([section], file, min(left, LONGEST.get(section, LONGEST_OTHER)), dry=False)
        print(f"{section}: {why or 'done'}, {time.monotonic() - started:.0f} s", flush=True)
        if why:
            cut.append(f"{section}: {why}")
    return *read(file), cut


def written(out: Path, machine: dict[str, Any], rows: list[report.Row], cut: list[str]) -> None:
    """The results as files, named after the device."""
    out.mkdir(parents=True, exist_ok=True)
    name = report.short_name(machine["device"])
    comparing = ("configs", "specialized")
    head = {"machine": machine, "command": "python -m benchmarks.gpu", "cut": cut}
    kernels = head | {"rows": [row for row in rows if row["section"] not in comparing]}
    configs = head | {"winners": report.winners(rows), "rows": [row for row in rows if row["section"] in comparing]}
    for kind, content in (("kernels", kernels), ("configs", configs)):
        (out / f"{name}-{kind}.json").write_text(json.dumps(content, indent=1) + "\n")


def main() -> int:
    """Parses the command line, runs and prints; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--seconds", type=float, default=520)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--dry", action="store_true")
    args = parser.parse_args()
    if reason := unready(args.out):
        print(reason)
        return 3
    with tempfile.TemporaryDirectory() as folder:
        if args.dry or not has_gpu():
            if not args.dry:
                print("No GPU here: nothing is measured. A dry run follows, which shows mistakes in the scripts.")
            failed = dry_run(args.sections, Path(folder))
            return failed or (0 if args.dry else 3)
        machine, rows, cut = full_run(args.sections, Path(folder), args.seconds)
    if not machine:
        print("FAILED: no section came so far as to tell the device", *cut, sep="\n")
        return 1
    written(args.out, machine, rows, cut)
    passed = [row for row in rows if row.get("passed")]
    print(f"{machine['device']}, torch {machine['torch']}, triton {machine['triton']}; {len(passed)} tests passed")
    failed_lines = [f"FAILED: {line}" for line in report.failures(rows)]
    best = [f"winner: {case}: {side}" for case, side in report.winners(rows).items()]
    for line in (*report.table(rows), *best, *report.goals(rows), *failed_lines, *(f"cut: {line}" for line in cut)):
        print(line)
    return 1 if failed_lines or cut else 0


if __name__ == "__main__":
    sys.exit(main())
