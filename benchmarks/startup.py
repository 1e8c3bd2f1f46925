"""How long the language commands take and how much memory, as whole processes: start, work, exit.

python benchmarks/startup.py [--repeats 15] [--out FILE.json]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# No language command may hold more at its peak; bytes.
MEMORY = 300 * 10**6
SPECS = sorted(Path("specs").glob("*.yaml"))
# Fifty different files, each shipped spec about twice.
FIFTY = tuple(f"{{folder}}/{number}.yaml" for number in range(50))
# The command line and the most seconds that it may take.
COMMANDS: dict[tuple[str, ...], float] = {
    ("--help",): 0.3,
    ("validate", "specs/deepseek-v3.yaml"): 0.5,
    ("validate", "specs/deepseek-v3-nano.yaml"): 0.5,
    ("show", "specs/deepseek-v3.yaml"): 0.5,
    ("plan", "specs/deepseek-v3.yaml"): 0.5,
    ("diff", "specs/deepseek-v3.yaml", "specs/deepseek-v3.2.yaml"): 1.0,
    ("validate", *FIFTY): 3.0,
    ("validate", *FIFTY, "--policy", "{folder}/policy.yaml", "--format", "sarif"): 3.0,
}
# A rule that every shipped spec keeps.
POLICY = "properties: {parallelism: {properties: {world_size: {title: at most 4096 ranks, maximum: 4096}}}}\n"


def measured(command: list[str]) -> tuple[float, int]:
    """Seconds that a process takes, and the most bytes that it holds. Exits where it fails."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    process.stderr.close()
    if process.returncode:
        sys.exit(f"{' '.join(command)}: {errors}")
    return seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    """Measures every command and exits 1 if one is over its limit of time or memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    program = [str(Path(sys.executable).with_name("modelspec"))]
    rows = []
    missed = False
    with tempfile.TemporaryDirectory() as folder:
        for number in range(50):
            spec = SPECS[number % len(SPECS)].stem
            text = f"extends: modelspec:{spec}\nname: copy-{number}\n"
            Path(folder, f"{number}.yaml").write_text(text)
        Path(folder, "policy.yaml").write_text(POLICY)
        for command, limit in COMMANDS.items():
            arguments = [part.format(folder=folder) for part in command]
            runs = [measured([*program, *arguments]) for _ in range(args.repeats)]
            median, peak = statistics.median(seconds for seconds, _ in runs), max(peak for _, peak in runs)
            missed |= median > limit or peak > MEMORY
            shown = " ".join(command).replace(" ".join(FIFTY), "(50 specs)").replace("{folder}/", "")
            rows.append({"command": f"modelspec {shown}", "median": median, "limit": limit, "peak_bytes": peak})
            print(f"modelspec {shown:55} {median:6.3f} s, at most {limit} s; {peak / 10**6:4.0f} MB")
    if args.out:
        args.out.write_text(json.dumps(rows, indent=2) + "\n")
    sys.exit(missed)


if __name__ == "__main__":
    main()
