"""A full training step of one model: ours beside transformers, in one run.

Every variant is a process of its own that holds the same weights, takes the same tokens and steps the same fused AdamW.
The processes take turns, one step to warm up and a few that count, round after round and in alternating order, so that
what the machine does meanwhile falls on all of them alike. Reported are medians, the median over rounds of the ratio to
ours, the peak of resident memory above that of a process that has only imported its libraries, and the share of the
machine's own rate for a large FP32 product.

    python benchmarks/train_step.py [--rounds 12] [--steps 3] [--compiled] [--out FILE.json]
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

BATCH, SEQUENCE = 8, 256
TOKENS = BATCH * SEQUENCE
SPEC = Path(__file__).with_name("v3-20m.yaml")

EAGER = (
    "modelspec",
    "modelspec, allocator untouched",
    "transformers, eager experts",
    "transformers, grouped_mm experts",
    "transformers, grouped_mm experts, our allocator settings",
)
COMPILED = ("modelspec, layers compiled", "transformers, layers compiled", "transformers, whole model compiled")


def rss() -> int:
    """Resident bytes now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def peak_rss() -> int:
    """The most resident bytes so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


Loss = Callable[[], "torch.Tensor"]


def ours(weights: str, tokens: "torch.Tensor") -> "tuple[torch.nn.Module, Loss, Iterable[torch.nn.Module]]":
    """Our model, its loss on the tokens, and its layers."""
    import modelspec

    model = modelspec.from_pretrained(weights)
    targets = tokens.roll(-1, dims=1)
    targets[:, -1] = -100

    def loss() -> "torch.Tensor":
        value = model(tokens, targets=targets).loss
        assert value is not None
        return value

    return model, loss, model.layers.children()


def theirs(
    weights: str, tokens: "torch.Tensor", experts: str
) -> "tuple[torch.nn.Module, Loss, Iterable[torch.nn.Module]]":
    """The model of transformers, its loss on the tokens, and its layers."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        weights, attn_implementation="sdpa", experts_implementation=experts
    ).train()
    return model, lambda: model(input_ids=tokens, labels=tokens, use_cache=False).loss, model.model.layers


def worker(variant: str, weights: str) -> None:
    """One variant: a line when ready, then the seconds per step for every line of input with a number of steps."""
    from modelspec.builders.allocator import keep_freed_memory

    is_ours = variant.startswith("modelspec")
    if "our allocator" in variant or (is_ours and "untouched" not in variant):
        keep_freed_memory()
    import torch

    if is_ours:
        import modelspec.builders.hf  # noqa: F401  # what is resident before a model is
    else:
        import transformers.models.deepseek_v3.modeling_deepseek_v3  # noqa: F401  # likewise
    idle = rss()
    generator = torch.Generator().manual_seed(1)
    frequencies = 1 / (torch.arange(8192) + 2.7)
    tokens = torch.multinomial(frequencies, TOKENS, replacement=True, generator=generator).view(BATCH, SEQUENCE)
    if is_ours:
        model, loss, layers = ours(weights, tokens)
    else:
        model, loss, layers = theirs(weights, tokens, "eager" if "eager" in variant else "grouped_mm")
    if "layers compiled" in variant:
        for layer in layers:
            layer.compile()
    elif "whole model compiled" in variant:
        model.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step() -> float:
        value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return value.item()

    first = step()
    step()
    print(json.dumps({"first_loss": first}), flush=True)
    for line in sys.stdin:
        step()  # The turn of the others has cooled caches and put threads to sleep.
        started = time.perf_counter()
        for _ in range(int(line)):
            step()
        seconds = (time.perf_counter() - started) / int(line)
        print(json.dumps({"seconds": seconds, "memory": peak_rss() - idle}), flush=True)


def gemm_rate() -> float:
    """FLOP/s of the fastest large FP32 product that torch offers here."""
    import torch

    from modelspec.kernels.linear import matmul_nt

    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    times = []
    for product in (torch.mm, matmul_nt):
        for _ in range(8):
            started = time.perf_counter()
            product(a, b)
            times.append(time.perf_counter() - started)
    return 2 * 2048**3 / min(times)


def flops_per_token() -> float:
    """FLOPs of the products of one token, forward and backward: 6 per active weight, and causal attention."""
    import modelspec
    from modelspec.schema import MLA

    spec = modelspec.load(SPEC)
    tensors = spec.model.main_tensors()
    weights = sum(t.active for name, t in tensors.items() if len(t.shape) > 1 and name != "embed_tokens.weight")
    mla = spec.model.attention["mla"]
    assert isinstance(mla, MLA)
    width = mla.qk_nope_head_dim + mla.qk_rope_head_dim + mla.v_head_dim
    attention = 2 * mla.num_heads * width * SEQUENCE / 2 * spec.model.num_layers
    return 3 * (2 * weights + attention)


def measure(variants: tuple[str, ...], rounds: int, steps: int, weights: str) -> list[dict[str, Any]]:
    """Runs all variants in turns; a row for each."""
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, "--worker", variant, "--weights", weights],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for variant in variants
    ]
    streams = [(process.stdin, process.stdout) for process in processes]
    rows: list[dict[str, Any]] = []
    for variant, (_, out) in zip(variants, streams, strict=True):
        assert out is not None
        rows.append({"variant": variant, **json.loads(out.readline()), "seconds": []})
        print(f"ready: {variant}", file=sys.stderr)
    for number in range(rounds):
        order = list(range(len(variants)))
        for index in order if number % 2 == 0 else order[::-1]:
            stdin, out = streams[index]
            assert stdin is not None and out is not None
            print(steps, file=stdin, flush=True)
            answer = json.loads(out.readline())
            rows[index]["seconds"].append(answer["seconds"])
            rows[index]["memory"] = answer["memory"]
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
    for process in processes:
        process.communicate()
    return rows


def summarize(rows: list[dict[str, Any]], rate: float) -> dict[str, Any]:
    """Medians and ratios from the raw times."""
    flops, ours = flops_per_token(), rows[0]["seconds"]
    for row in rows:
        median = statistics.median(row["seconds"])
        row["tokens_per_second"] = TOKENS / median
        row["times_slower_than_ours"] = statistics.median(b / a for a, b in zip(ours, row["seconds"], strict=True))
        row["share_of_gemm_rate"] = flops * TOKENS / median / rate
    return {"gemm_flops": rate, "flops_per_token": flops, "rows": rows}


def machine() -> dict[str, Any]:
    """What the figures belong to."""
    import torch

    cpuinfo = Path("/proc/cpuinfo").read_text()
    names = {line.split(":")[1].strip() for line in cpuinfo.splitlines() if line.startswith("model name")}
    return {
        "cpu": ", ".join(sorted(names)),
        "cores": os.cpu_count(),
        "avx512": "avx512f" in cpuinfo,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "command": f"python benchmarks/train_step.py {' '.join(sys.argv[1:])}".strip(),
    }


def main() -> None:
    """Parses the command line, runs and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=3, help="steps of a variant per round")
    parser.add_argument(
        "--compiled", action="store_true", help="also the compiled variants; they take minutes to start"
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--weights", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker, args.weights)
        return
    import modelspec

    with tempfile.TemporaryDirectory() as folder:
        weights = f"{folder}/weights"
        modelspec.save_pretrained(modelspec.build(modelspec.load(SPEC)), weights)
        variants = EAGER + (COMPILED if args.compiled else ())
        rows = measure(variants, args.rounds, args.steps, weights)
    result = {"machine": machine(), "batch": [BATCH, SEQUENCE], **summarize(rows, gemm_rate())}
    print(f"FP32 product {result['gemm_flops'] / 1e9:.0f} GFLOP/s, {result['flops_per_token'] / 1e6:.1f} MFLOP a token")
    print(f"{'variant':58} {'tokens/s':>9} {'ours is':>8} {'memory':>9} {'of GEMM':>8} {'first loss':>11}")
    for row in result["rows"]:
        print(
            f"{row['variant']:58} {row['tokens_per_second']:9.0f} {row['times_slower_than_ours']:7.2f}x "
            f"{row['memory'] / 2**20:6.0f} MB {row['share_of_gemm_rate']:8.1%} {row['first_loss']:11.6f}"
        )
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
