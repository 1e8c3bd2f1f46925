"""`modelspec import` beside `cp` and `sync` of the same files.

Makes Hugging Face checkpoints of random bytes, one shaped like Llama in BF16 and one like DeepSeek-V3 in block-scaled
FP8, and takes turns: copy the files and wait for the disk, then import them and wait for the disk. The import is the
whole command in a process of its own, start of Python, digests and checks of every tensor included. Both read from the
disk, as of a checkpoint that does not fit into memory; with --warm both find the files in the page cache. Reported are
medians, the median over rounds of the ratio of rates, and the peak of the command's resident memory beside that of one
that only prints its help.

    python benchmarks/import_checkpoint.py [--gb 4] [--rounds 5] [--warm] [--folder DIR] [--out FILE.json]
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

MODELSPEC = [sys.executable, "-m", "modelspec"]
SHAPES: dict[str, list[str]] = {
    "llama-3.1-8b": ["model.vocab_size=32000"],
    "deepseek-v3": [
        *("model.vocab_size=32000", "model.hidden_size=2048", "model.attention.mla.num_heads=16"),
        *("model.ffn.dense.intermediate_size=10944", "model.ffn.moe.intermediate_size=1408"),
        *("model.ffn.moe.num_experts=64", "training=null", "parallelism=null", "precision=null"),
    ],
}


def layers(shape: str, count: int) -> list[str]:
    """The overrides that give a shape so many layers."""
    index, first = (1, ["model.layers.0.repeat=1"]) if shape == "deepseek-v3" else (0, [])
    return [*SHAPES[shape], *first, f"model.layers.{index}.repeat={count}"]


def noise(count: int) -> Iterator[bytes]:
    """So many random bytes."""
    while count:
        piece = os.urandom(min(count, 8 * 2**20))
        count -= len(piece)
        yield piece


def make(shape: str, size: float, folder: Path) -> int:
    """Writes a checkpoint of about `size` bytes; gives its bytes of tensors."""
    import modelspec
    from modelspec.builders.hf.convert import hub_table, write_hub
    from modelspec.builders.tensor_files import TORCH_DTYPES
    from modelspec.builders.tensor_writer import Planned
    from modelspec.hf_config import Quantization, config_from_spec

    def table(count: int) -> tuple[Any, list[Planned]]:
        spec = modelspec.load(f"specs/{shape}.yaml", overrides=layers(shape, count))
        headers = hub_table(spec.model, block=(128, 128) if shape == "deepseek-v3" else None)
        return spec, [
            Planned(name, h.dtype, h.shape, partial(noise, prod(h.shape) * TORCH_DTYPES[h.dtype].itemsize))
            for name, h in headers.items()
        ]

    one, two = (sum(tensor.bytes for tensor in table(count)[1]) for count in (1, 2))
    spec, tensors = table(max(round((size - one) / (two - one)) + 1, 1))
    config = config_from_spec(spec, "bfloat16", Quantization() if shape == "deepseek-v3" else None)
    write_hub(folder, tensors, config)
    return sum(tensor.bytes for tensor in tensors)


def forget(folder: Path) -> None:
    """Drops the files of a folder from the page cache."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timed(command: list[str], out: Path, cold: Path | None = None) -> tuple[float, int]:
    """Seconds of a command and of the `sync` after it, and the peak of its resident bytes.

    Before, `out` is removed and the files of `cold` are dropped from the page cache.
    """
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    if cold is not None:
        forget(cold)
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command[0]} failed with {process.returncode}")
    os.sync()
    return time.perf_counter() - started, usage.ru_maxrss * 1024


def measure(shape: str, gb: float, rounds: int, folder: Path, warm: bool) -> dict[str, Any]:
    """One row of the table."""
    source, out = folder / shape, folder / "out"
    size = make(shape, gb * 1e9, source)
    cold = None if warm else source
    copying, importing, peaks = [], [], []
    for number in range(rounds):
        order = [0, 1] if number % 2 == 0 else [1, 0]
        for which in order:
            if which == 0:
                copying.append(timed(["cp", "-r", str(source), str(out)], out, cold)[0])
            else:
                seconds, peak = timed([*MODELSPEC, "import", str(source), "-o", str(out)], out, cold)
                importing.append(seconds)
                peaks.append(peak)
        print(f"{shape}: round {number + 1} of {rounds}", file=sys.stderr)
    files = len(list(source.glob("*.safetensors")))
    for done in (source, out):
        shutil.rmtree(done)
    return {
        "checkpoint": shape,
        "bytes": size,
        "files": files,
        "cp_and_sync_seconds": copying,
        "import_seconds": importing,
        "cp_gb_per_second": size / 1e9 / statistics.median(copying),
        "import_gb_per_second": size / 1e9 / statistics.median(importing),
        "rate_of_cp": statistics.median(c / i for c, i in zip(copying, importing, strict=True)),
        "peak_memory": max(peaks),
    }


def machine(args: argparse.Namespace) -> dict[str, Any]:
    """What the figures belong to."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    names = {line.split(":")[1].strip() for line in cpuinfo.splitlines() if line.startswith("model name")}
    arguments = [f"--gb {args.gb:g}", f"--rounds {args.rounds}", *(["--warm"] if args.warm else [])]
    return {
        "cpu": ", ".join(sorted(names)),
        "cores": os.cpu_count(),
        "sha_ni": "sha_ni" in cpuinfo,
        "python": platform.python_version(),
        "command": f"python benchmarks/import_checkpoint.py {' '.join(arguments)}",
    }


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=4, help="size of each checkpoint")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warm", action="store_true", help="leave the files in the page cache")
    parser.add_argument("--folder", type=Path, help="where to write; needs three times the size")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    """Measures and prints."""
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        _, idle = timed([*MODELSPEC, "import", "--help"], Path(folder, "out"))
        rows = [measure(shape, args.gb, args.rounds, Path(folder), args.warm) for shape in SHAPES]
    result = {"machine": machine(args), "peak_memory_of_help": idle, "rows": rows}
    print(f"{'checkpoint':14} {'size':>8} {'cp, sync':>10} {'import':>10} {'of cp':>6} {'memory':>8}")
    for row in rows:
        print(
            f"{row['checkpoint']:14} {row['bytes'] / 1e9:5.2f} GB {row['cp_gb_per_second']:5.2f} GB/s "
            f"{row['import_gb_per_second']:5.2f} GB/s {row['rate_of_cp']:6.2f} {row['peak_memory'] / 2**20:5.0f} MB"
        )
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main(parse())
