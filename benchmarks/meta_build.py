"""What it takes to build every shipped spec at full size on the meta device: a fresh process for each.

python benchmarks/meta_build.py [--out FILE.json]

Seconds are those of the whole process, of which importing torch is the greater part; memory is the most that it held.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

# The most that any spec may take.
SECONDS, MEGABYTES = 10.0, 1000.0

SPECS = sorted(path.stem for path in (Path(__file__).parents[1] / "specs").glob("*.yaml"))

CHILD = """
import json, resource, sys
from modelspec.builders import build
from modelspec.validate import load
model = build(load(f"modelspec:{sys.argv[1]}"), device="meta")
unit = 1 if sys.platform == "darwin" else 1024
print(json.dumps({
    "parameters": sum(parameter.numel() for parameter in model.parameters()),
    "megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6,
}))
"""


def measured(name: str) -> dict[str, Any]:
    """One spec, built in a process of its own."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", CHILD, name], check=True, capture_output=True, text=True)
    return {"spec": name, **json.loads(done.stdout), "seconds": time.perf_counter() - started}


def machine() -> dict[str, Any]:
    """What the figures belong to."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return {
        "cpu": next(line.split(":")[1].strip() for line in lines if line.startswith("model name")),
        "cores": os.cpu_count(),
        "torch": version("torch"),
        "command": "python benchmarks/meta_build.py",
    }


def main() -> None:
    """Builds every spec and exits 1 if one takes more than it may."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = []
    for name in SPECS:
        row = measured(name)
        rows.append(row)
        print(f"{name:24} {row['parameters']:>18,} parameters {row['seconds']:6.2f} s {row['megabytes']:6.0f} MB")
    if args.out:
        args.out.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=2) + "\n")
    sys.exit(any(row["seconds"] > SECONDS or row["megabytes"] > MEGABYTES for row in rows))


if __name__ == "__main__":
    main()
