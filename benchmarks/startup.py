"""How long the language commands take, as whole processes: start, work, exit.

python benchmarks/startup.py [--repeats 15] [--out FILE.json]
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

# The command line and the most seconds that it may take.
COMMANDS = {
    ("--help",): 0.3,
    ("validate", "specs/deepseek-v3.yaml"): 0.5,
    ("validate", "specs/deepseek-v3-nano.yaml"): 0.5,
    ("show", "specs/deepseek-v3.yaml"): 0.5,
    ("plan", "specs/deepseek-v3.yaml"): 0.5,
}


def main() -> None:
    """Measures every command and exits 1 if one is over its limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    program = [str(Path(sys.executable).with_name("modelspec"))]
    rows = []
    slow = False
    for command, limit in COMMANDS.items():
        seconds = []
        for _ in range(args.repeats):
            started = time.perf_counter()
            subprocess.run([*program, *command], check=True, capture_output=True)
            seconds.append(time.perf_counter() - started)
        median = statistics.median(seconds)
        slow |= median > limit
        rows.append({"command": f"modelspec {' '.join(command)}", "median": median, "limit": limit})
        print(f"modelspec {' '.join(command):35} {median:6.3f} s, at most {limit} s")
    if args.out:
        args.out.write_text(json.dumps(rows, indent=2) + "\n")
    sys.exit(slow)


if __name__ == "__main__":
    main()
