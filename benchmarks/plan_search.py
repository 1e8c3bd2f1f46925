"""What `modelspec plan --search` takes of one core and of memory, as whole processes, and how many layouts it judges.

Seconds are those of the processor, so that what else a machine does changes little.

python benchmarks/plan_search.py [--repeats 3] [--out FILE.json]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

# At least so many layouts a second, and at most so many bytes.
LAYOUTS, MEMORY = 500, 300 * 10**6
CASES = (
    ("deepseek-v3", "h800", 2048, ()),
    ("deepseek-v3", "h800", 2048, ("data.zero=1", "tensor=1", "context=1")),
    ("deepseek-v3", "h200", 256, ()),
    ("kimi-k2", "h800", 2048, ()),
    ("llama-3.1-405b", "h100", 1024, ()),
    ("llama-3.1-70b", "h100", 64, ()),
    ("llama-3.1-70b", "h100", 64, ("data.zero=1", "context=1")),
    ("qwen3-next-80b-a3b", "h200", 64, ()),
)


def measured(command: list[str]) -> tuple[float, int, dict[str, Any]]:
    """Seconds of the processor that a search takes, the most bytes that it holds, and what it found."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    found = json.loads(process.stdout.read())["search"]
    _, _, usage = os.wait4(process.pid, 0)
    process.returncode = 0
    process.stdout.close()
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return usage.ru_utime + usage.ru_stime, peak, found


def _told(candidate: Any) -> dict[str, object] | None:
    """A layout and its figures, in short."""
    figures = ("step_seconds", "tokens_per_second_per_gpu", "bubble", "memory_bytes", "verdict")
    return candidate and {"set": " ".join(candidate["set"]), **{name: candidate[name] for name in figures}}


def main() -> None:
    """Measures every case and exits 1 if one is over its limit of time or memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    program, rows, missed = str(Path(sys.executable).with_name("modelspec")), [], False
    for spec, hardware, gpus, fixed in CASES:
        kept = [part for key in fixed for part in ("--set", f"parallelism.{key}")]
        options = ["--search", "--hardware", hardware, "--gpus", str(gpus), *kept, "--format", "json"]
        runs = [measured([program, "plan", f"specs/{spec}.yaml", *options]) for _ in range(args.repeats)]
        seconds, peak = statistics.median(each[0] for each in runs), max(each[1] for each in runs)
        found = runs[0][2]
        front = found["front"]
        assert isinstance(front, list) and isinstance(found["examined"], int)
        rate = found["examined"] / seconds
        missed |= rate < LAYOUTS or peak > MEMORY
        row = {
            "command": f"modelspec plan specs/{spec}.yaml {' '.join(options[:-2])}",
            "seconds": round(seconds, 2),
            "layouts": found["examined"],
            "layouts_per_second": round(rate),
            "fitting": found["fitting"],
            "simulated": found["simulated"],
            "front": len(front),
            "peak_bytes": peak,
            "fastest": _told(front[0]),
            "own": _told(found["own"]),
        }
        rows.append(row)
        print(
            f"{spec:20} {gpus:5} {hardware:5} {seconds:6.2f} s  {row['layouts']:>8,} layouts, "
            f"{row['fitting']:>6,} fit, {row['simulated']:>4} simulated, {row['front']:>3} on the front, "
            f"{peak / 10**6:4.0f} MB",
            flush=True,
        )
    if args.out:
        args.out.write_text(json.dumps(rows, indent=2) + "\n")
    sys.exit(missed)


if __name__ == "__main__":
    main()
