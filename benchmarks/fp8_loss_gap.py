"""The loss in FP8 beside that in the compute dtype: the same model, text and seeds; and the error of its gradients.

    python -m benchmarks.fp8_loss_gap [--steps 600] [--seeds 0 1 2] [--work DIR] [--gradients-only]

Every run is one of `modelspec train` in a folder of --work, and goes on where it stopped; the results are written after
each. Validation losses are smoothed over the run, and the relative difference is FP8's over the compute dtype's of the
same seed. One seed trained twice in slightly different arithmetic drifts apart by itself: so the spread between seeds
stands beside it, and a control, the compute dtype once more with sums in another order (the kernels' references). What
tells a right recipe from a wrong one is the second part, `fp8_gradients.py`, on the first seed's model as the compute
dtype trained it.

Writes benchmarks/results/fp8-loss-gap.json and .png.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import mean, median, stdev
from time import process_time
from typing import Any

from benchmarks.fp8_gradients import gradient_errors
from modelspec.builders.allocator import keep_freed_memory
from modelspec.kernels.op import use
from modelspec.validate import load

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "fp8-loss-gap.json"
SPEC = ROOT / "specs" / "deepseek-v3-nano-fp8.yaml"
# Share of the past in the smoothed loss, from one evaluation to the next.
DECAY = 0.8
EVALUATIONS = 30
VARIANTS = {"compute": ["precision.fp8=null"], "fp8": [], "control": ["precision.fp8=null"]}


def recipe(steps: int, seed: int) -> list[str]:
    """nano's schedule stretched to so many steps, and evaluations spread over them."""
    rate = (
        f"[{{until_steps: {max(steps // 10, 1)}, ramp: [0.0, 3.0e-3]}}, {{until_steps: {max(steps * 6 // 10, 2)}, "
        f"value: 3.0e-3}}, {{until_steps: {steps}, cosine: [3.0e-3, 1.0e-4]}}]"
    )
    every = max(steps // EVALUATIONS, 1)
    return [
        f"training.stages.0.steps={steps}",
        f"training.stages.0.learning_rate={rate}",
        f"training.seed={seed}",
        f"training.evaluation={{every_steps: {every}, tokens: 32768}}",
        f"training.checkpoint={{every_steps: {max(steps // 6, 1)}, keep_last: 1}}",
    ]


def trained(variant: str, steps: int, seed: int, work: Path) -> dict[str, Any]:
    """One run, from where it stopped: its validation losses by step, and its speed."""
    from modelspec.builders.trainer import train

    spec = load(SPEC, [*VARIANTS[variant], *recipe(steps, seed)])
    out = _folder(work, variant, steps, seed)
    with use("reference" if variant == "control" else "fastest"):
        train(spec, out, resume=True)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    speeds = [row["tokens_per_second"] for row in rows if "loss" in row]
    health = {key: row[key] for row in rows if "loss" in row for key in row if key.startswith("fp8_")}
    return {
        "variant": variant,
        "seed": seed,
        "steps": steps,
        "validation": [[row["step"], row["val_loss"]] for row in rows if "val_loss" in row],
        "skipped": sum(bool(row.get("skipped")) for row in rows),
        "tokens_per_second": round(median(speeds), 1),
        **({"health_at_the_end": health} if health else {}),
    }


def _folder(work: Path, variant: str, steps: int, seed: int) -> Path:
    return work / f"{variant}-{steps}-seed{seed}"


def smoothed(losses: Sequence[float]) -> list[float]:
    """The mean of all so far, each DECAY times as heavy as the next."""
    result, total, weight = [], 0.0, 0.0
    for loss in losses:
        total, weight = DECAY * total + loss, DECAY * weight + 1
        result.append(total / weight)
    return result


def gap(runs: Mapping[str, Any], steps: int, variant: str = "fp8") -> dict[str, Any] | None:
    """Relative differences by seed along the run, and at its end; None before a seed has both runs."""
    seeds = sorted(int(key.split("seed")[1]) for key in runs if key.startswith(f"{variant}-{steps}-"))
    curves: dict[int, list[float]] = {}
    ends: dict[str, list[float]] = {"compute": [], variant: []}
    for seed in seeds:
        if (base := runs.get(f"compute-{steps}-seed{seed}")) is None:
            continue
        pair = [base["validation"], runs[f"{variant}-{steps}-seed{seed}"]["validation"]]
        exact, narrow = (smoothed([loss for _, loss in rows]) for rows in pair)
        curves[seed] = [ours / theirs - 1 for ours, theirs in zip(narrow, exact, strict=True)]
        ends["compute"].append(exact[-1])
        ends[variant].append(narrow[-1])
    if not curves:
        return None
    final = [curve[-1] for curve in curves.values()]
    later = [abs(value) for curve in curves.values() for value in curve[len(curve) // 2 :]]
    return {
        "steps": steps,
        "at": [step for step, _ in runs[f"{variant}-{steps}-seed{next(iter(curves))}"]["validation"]],
        "relative_error": {str(seed): curve for seed, curve in curves.items()},
        "at_the_end": {
            "mean": mean(final),
            "spread": stdev(final) if len(final) > 1 else None,
            "largest_in_second_half": max(later),
        },
        "smoothed_loss_at_the_end": ends,
        "spread_between_seeds_of_the_compute_dtype": stdev(ends["compute"]) / mean(ends["compute"])
        if len(curves) > 1
        else None,
    }


def gradients(steps: int, seed: int, work: Path) -> dict[str, Any]:
    """Errors of gradients by recipe, on the model that the compute dtype trained so far."""
    import torch

    from modelspec.builders.corpus import prepare
    from modelspec.builders.data import Samples
    from modelspec.builders.generate import find_weights
    from modelspec.builders.weights import load as load_model

    spec = load(SPEC, recipe(steps, seed))
    assert spec.data and spec.data.sources and spec.data.tokenizer and spec.training
    weights, checkpoint = find_weights(_folder(work, "compute", steps, seed))
    samples = Samples(prepare(spec.data.sources, spec.data.tokenizer), seed)
    windows = samples.batch(10**6, 4, spec.training.stages[0].sequence_length)
    torch.manual_seed(0)
    return {
        "after_steps": checkpoint.position.step,
        "recipes": gradient_errors(spec, load_model(weights), windows),
    }


def cost(steps: int = 5) -> dict[str, Any]:
    """Tokens per second of processor time on one core, with and without emulated FP8; the two take turns."""
    import torch

    from modelspec.builders.learner import Learner
    from modelspec.timeline import timeline

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    learners, tokens = {}, 0
    seconds: dict[str, list[float]] = {"compute": [], "fp8": []}
    for variant in seconds:
        spec = load(SPEC, VARIANTS[variant])
        assert spec.training is not None
        learners[variant] = Learner(spec, spec.training, torch.device("cpu")), next(timeline(spec.training))
    for _ in range(steps + 2):
        for variant, (learner, first) in learners.items():
            batch = torch.randint(0, 4096, (first.batch_size, first.sequence_length + 1))
            tokens = first.batch_size * first.sequence_length
            began = process_time()
            learner.step(first, batch)
            seconds[variant].append(process_time() - began)
    torch.set_num_threads(threads)
    # The first two warm up.
    return {variant: round(tokens / median(times[2:])) for variant, times in seconds.items()}


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Left the relative difference of the losses, right the errors of gradients by recipe."""
    from matplotlib.figure import Figure

    ink, faint = "#3b3f46", "#d9dce1"
    figure = Figure(figsize=(11, 4.6), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    if (losses := results.get("losses")) is not None:
        for seed, curve in losses["relative_error"].items():
            (line,) = left.plot(losses["at"], [100 * value for value in curve], linewidth=1.6, label=f"seed {seed}")
            if (control := (results.get("control") or {}).get("relative_error", {}).get(seed)) is not None:
                percents = [100 * value for value in control]
                left.plot(losses["at"], percents, linewidth=1, linestyle=":", color=line.get_color())
        left.plot([], [], linewidth=1, linestyle=":", color=ink, label="no FP8, other sums")
        left.axhspan(-0.25, 0.25, color="#2f6fde", alpha=0.08, linewidth=0)
        left.axhline(0.0, color=faint, linewidth=1)
        left.set_xlabel("step", color=ink)
        left.legend(frameon=False, labelcolor=ink, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=4)
    left.set_title("validation loss, FP8 over the compute dtype; %", loc="left", fontsize=10, color=ink)
    if (found := results.get("gradients")) is not None:
        names = [name for name, errors in found["recipes"].items() if "quiet" in errors]
        for place, name in enumerate(names):
            color = "#b3261e" if name.startswith("wrong") else "#2f6fde"
            layers = [100 * value for value in found["recipes"][name]["quiet"]["layers"].values()]
            right.scatter(layers, [len(names) - place] * len(layers), s=14, alpha=0.5, color=color, linewidth=0)
            right.scatter([mean(layers)], [len(names) - place], s=120, marker="|", color=color)
        right.set_yticks(range(len(names), 0, -1), names, fontsize=8)
        right.set_xlim(left=0)
        right.set_ylim(0.4, len(names) + 0.6)
        right.set_xlabel("tokens with the 5 % smallest gradients; a dot is a layer", color=ink)
    right.set_title("error of the gradient at a layer's input; %", loc="left", fontsize=10, color=ink)
    for axes in (left, right):
        axes.grid(axis="both", color=faint, linewidth=0.7)
        axes.set_axisbelow(True)
        axes.tick_params(colors=ink, length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(faint)
    figure.savefig(path, format="png")


def write(results: dict[str, Any], steps: int) -> None:
    """Results so far, and the picture of them."""
    results["losses"] = gap(results["runs"], steps)
    results["control"] = gap(results["runs"], steps, "control")
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(results, indent=2) + "\n")
    draw(results, RESULT.with_suffix(".png"))


def main() -> None:
    """Runs what is asked for and not there yet."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "fp8-loss-gap")
    parser.add_argument(
        "--gradients-only", action="store_true", help="only the second part, from the runs that are there"
    )
    arguments = parser.parse_args()
    keep_freed_memory()
    results: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.exists() else {"runs": {}}
    results["machine"] = {"cores": os.cpu_count(), "torch": version("torch")}
    results["command"] = f"python -m benchmarks.fp8_loss_gap --steps {arguments.steps}"
    for seed in arguments.seeds:
        for variant in VARIANTS:
            key = f"{variant}-{arguments.steps}-seed{seed}"
            if key not in results["runs"] and not arguments.gradients_only:
                results["runs"][key] = trained(variant, arguments.steps, seed, arguments.work)
                write(results, arguments.steps)
                print(key, results["runs"][key]["validation"][-1], flush=True)
    results["tokens_per_second_of_one_core"] = cost()
    results["gradients"] = gradients(arguments.steps, arguments.seeds[0], arguments.work)
    write(results, arguments.steps)
    for name, errors in results["gradients"]["recipes"].items():
        print(f"{name:42}", "  ".join(f"{kind} {each['mean']:.2%}" for kind, each in errors.items()))
    if results["losses"] is not None:
        print(json.dumps(results["losses"]["at_the_end"]))


if __name__ == "__main__":
    main()
