"""Calibrates the model of time on published throughput, and says how wrong it is about each row.

    python benchmarks/plan_calibration.py --write --report docs/plan-time-accuracy.md \
        --out benchmarks/results/plan-calibration.json

A row of `published_throughput.csv` is a model, a device, a software and a layout, with the tokens per second that were
published for it. The model of time has a rate for each kind of work, one slowdown for each software and one for each
device; they are fitted to the logarithm of all rows, drawn towards values that are plausible by themselves, outliers
counting less. Then every row is left out once and predicted from the others: that is its error. `--write` writes the
fit to `modelspec/hardware/calibration.json`, which `plan` reads.
"""

import argparse
import csv
import json
import platform
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from modelspec.hardware import load as load_hardware
from modelspec.hardware.calibration import FILE
from modelspec.plan.step import COMPUTATION, OF_EXPERTS, Speed, Steps, speed
from modelspec.plan.training import training
from modelspec.schema import ModelSpec
from modelspec.schema.calibration import Calibration, Rates, Stack
from modelspec.validate import load

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "benchmarks" / "published_throughput.csv"

# Where each rate starts and what it is drawn to: common efficiencies of good kernels, and counts of passes.
PRIOR = Rates(
    fp8_products=1.33,
    products=1.33,
    expert_rows=150.0,
    attention=1.67,
    residual=12.0,
    heads=4.0,
    experts=4.0,
    quantize=1.3,
    layer=20e-6,
    moe_layer=20e-6,
    node=1.0,
    network=1.0,
    tensor=0.85,
    data=0.5,
    optimizer=1.3,
)
# GPU hours that the DeepSeek-V3 report states (arXiv 2412.19437, table 1).
PRETRAINING, EXTENSION, POST_TRAINING, TOTAL = 2664e3, 119e3, 5e3, 2788e3
DEEPSEEK = "deepseek-2024-12"
# One chip in three memories and networks.
DEVICE_GROUPS = {"h800": "h100", "h200": "h100"}
# How strongly rates, slowdowns of software and of devices are drawn to their priors, against one row's weight.
PULL_RATE, PULL_STACK, PULL_EXPERTS, PULL_DEVICE = 0.3, 0.3, 0.3, 1.0
# Errors of the logarithm beyond this count linearly, not squared.
OUTLIER = 0.15


@dataclass(frozen=True)
class Row:
    """One published figure."""

    number: int
    stack: str
    hardware: str
    device: str
    model: str
    layout: str
    published: float
    spec: ModelSpec
    batch: int
    sequence: int

    @property
    def seconds(self) -> float:
        """Of one step."""
        return self.batch * self.sequence / (self.published * self.spec.parallelism.world_size)


def rows() -> list[Row]:
    """The published figures."""
    with ROWS.open(newline="") as stream:
        return [_row(number, fields) for number, fields in enumerate(csv.DictReader(stream))]


def _row(number: int, fields: dict[str, str]) -> Row:
    interleaved = int(fields["stages_per_rank"])
    schedule = "interleaved_1f1b" if interleaved > 1 else "1f1b"
    if fields["stack"].startswith("deepseek"):
        schedule = "dualpipev"
    pipeline = f"{{size: {fields['pipeline']}, schedule: {schedule}}}"
    if schedule == "interleaved_1f1b":
        pipeline = f"{{size: {fields['pipeline']}, schedule: {schedule}, stages_per_rank: {interleaved}}}"
    recompute = fields["recompute"].replace("+", ", ")
    blocks = "activation_block: [1, 128], weight_block: [128, 128]"
    fp8 = f"{{format: e4m3, {blocks}, scales: float32, gemms: [forward, dgrad, wgrad]}}"
    overrides = [
        "training=null",
        "parallelism=null",
        f"parallelism={{world_size: {fields['gpus']}, pipeline: {pipeline}, expert: {fields['expert']}, "
        f"tensor: {fields['tensor']}, context: {fields['context']}, microbatch_size: {fields['microbatch']}, "
        f"data: {{zero: 1}}, recompute: [{recompute}]}}",
        f"precision={{compute: bfloat16, fp8: {'null' if fields['precision'] == 'bf16' else fp8}}}",
    ]
    if fields["mtp"] == "no":
        overrides.append("model.mtp=null")
    spec = load(str(ROOT / "specs" / f"{fields['spec']}.yaml"), overrides)
    layout = "/".join(fields[key] for key in ("tensor", "pipeline", "stages_per_rank", "context", "expert"))
    return Row(
        number,
        fields["stack"],
        fields["hardware"],
        DEVICE_GROUPS.get(fields["hardware"], fields["hardware"]),
        f"{fields['spec']}{'' if fields['mtp'] == 'yes' or fields['spec'] != 'deepseek-v3' else ' without MTP'}",
        f"{fields['gpus']} GPUs, {fields['precision']}, {layout}, {fields['batch']}x{fields['microbatch']}",
        float(fields["tokens_per_second_per_gpu"]),
        spec,
        int(fields["batch"]),
        int(fields["sequence"]),
    )


class Fit:
    """The rows as one problem of least squares over logarithms, given where each step's time goes.

    A step's time is a sum over kinds of work of ideal seconds times rates, times what the schedule adds; the latter
    depends on the rates too, little, and is held fixed until the next round.
    """

    def __init__(self, found: list[Row]) -> None:
        self.rows = found
        self.kinds = list(Rates.model_fields)
        self.stacks = sorted({row.stack for row in found})
        self.devices = sorted({row.device for row in found})
        self.stack = np.array([self.stacks.index(row.stack) for row in found])
        self.device = np.array([self.devices.index(row.device) for row in found])
        self.target = np.log([row.seconds for row in found])
        self.computes = np.array([kind in COMPUTATION for kind in self.kinds])
        rates = np.log([getattr(PRIOR, kind) for kind in self.kinds])
        self.of_experts = np.array([kind in OF_EXPERTS for kind in self.kinds])
        self.prior = np.concatenate([rates, np.zeros(2 * len(self.stacks) + len(self.devices))])
        pulls = (PULL_RATE, PULL_STACK, PULL_EXPERTS, PULL_DEVICE)
        sizes = (len(self.kinds), len(self.stacks), len(self.stacks), len(self.devices))
        self.pull = np.concatenate([np.full(size, pull) for size, pull in zip(sizes, pulls, strict=True)])
        self.ideal = np.zeros((len(found), len(self.kinds)))

    def look(self, parameters: np.ndarray) -> None:
        """Sets the ideal seconds of every row, with what the schedule adds at these rates."""
        for index, row in enumerate(self.rows):
            own = self.speed(parameters, row)
            steps = Steps(row.spec, row.sequence, load_hardware(row.hardware), own)
            step = steps.step(row.batch)
            kinds = dict(step.kinds)
            if sent := kinds["node"] + kinds["network"]:
                kinds |= {name: kinds[name] * (1 - step.hidden / sent) for name in ("node", "network")}
            idle = step.seconds / sum(kinds.values())
            for kind, name in enumerate(self.kinds):
                self.ideal[index, kind] = idle * kinds[name] / (getattr(own.rates, name) * own.factor(name))

    def speed(self, parameters: np.ndarray, row: Row) -> Speed:
        """What the parameters say of a row's software and device."""
        rates, stacks, experts, devices = self.split(parameters)
        return Speed(
            Rates(**dict(zip(self.kinds, map(float, np.exp(rates)), strict=True))),
            row.stack,
            float(np.exp(stacks[self.stacks.index(row.stack)])),
            float(np.exp(experts[self.stacks.index(row.stack)])),
            float(np.exp(devices[self.devices.index(row.device)])),
        )

    def split(self, parameters: np.ndarray) -> list[np.ndarray]:
        """Logarithms of rates, of slowdowns of software, in all and for experts, and of slowdowns of devices."""
        stacks = len(self.stacks)
        return np.split(parameters, np.cumsum([len(self.kinds), stacks, stacks]))

    def predict(self, parameters: np.ndarray) -> np.ndarray:
        """Logarithm of every row's seconds."""
        rates, stacks, experts, devices = self.split(parameters)
        each = self.ideal * np.exp(rates)
        each = np.where(self.of_experts, each * np.exp(experts[self.stack])[:, None], each)
        each = np.where(self.computes, each * np.exp(devices[self.device])[:, None], each)
        return np.asarray(stacks[self.stack] + np.log(each.sum(1)))

    def solve(self, start: np.ndarray, left_out: Collection[int] = ()) -> np.ndarray:
        """The parameters that fit best, by Gauss-Newton steps, without some rows."""
        weights = np.ones(len(self.rows))
        weights[list(left_out)] = 0.0
        parameters = start.copy()
        for _ in range(100):
            errors = self.predict(parameters) - self.target
            slopes = np.stack([self.predict(parameters + shift) for shift in 1e-6 * np.eye(len(parameters))])
            jacobian = (slopes - self.predict(parameters)).T / 1e-6
            robust = weights * np.minimum(1.0, OUTLIER / np.maximum(np.abs(errors), 1e-12)) * 4.0
            matrix = jacobian.T @ (robust[:, None] * jacobian) + np.diag(self.pull)
            gradient = jacobian.T @ (robust * errors) + self.pull * (parameters - self.prior)
            move = np.linalg.solve(matrix, gradient)
            parameters = parameters - move * min(1.0, 0.5 / np.abs(move).max())
            if np.abs(move).max() < 1e-6:
                break
        return parameters


@dataclass(frozen=True)
class Errors:
    """Predicted over published tokens per second, less 1, of one row.

    `fit`: with all rows. `left_out`: from all others. `twins_out`: from all that are of another model or device.
    """

    fit: float
    left_out: float
    twins_out: float


def calibrate(fit: Fit) -> tuple[np.ndarray, list[Errors]]:
    """The fit, and how wrong it is about every row."""
    parameters = fit.prior
    for _ in range(4):
        fit.look(parameters)
        parameters = fit.solve(parameters)

    def error(index: int, left_out: Collection[int]) -> float:
        without = fit.solve(parameters, left_out) if left_out else parameters
        return float(np.exp(fit.target[index] - fit.predict(without)[index]) - 1)

    found = []
    for index, row in enumerate(fit.rows):
        twins = [other.number for other in fit.rows if (other.model, other.hardware) == (row.model, row.hardware)]
        found.append(Errors(error(index, ()), error(index, (index,)), error(index, twins)))
    return parameters, found


def main() -> None:
    """Fits, prints every row, and writes what was asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, help="JSON of every row")
    parser.add_argument("--report", type=Path, help="Markdown of every row, as it is printed")
    parser.add_argument("--write", action="store_true", help="write the fit to modelspec/hardware/calibration.json")
    arguments = parser.parse_args()
    fit = Fit(rows())
    parameters, errors = calibrate(fit)
    calibration = _calibration(fit, parameters, errors)
    text = "\n".join(report(fit, errors, calibration)) + "\n"
    print(text, end="")
    if arguments.report:
        arguments.report.write_text(text)
    if arguments.write:
        FILE.write_text(json.dumps(calibration.model_dump(), indent=2) + "\n")
    if arguments.out:
        arguments.out.write_text(json.dumps(_json(fit, errors, calibration), indent=1) + "\n")


def report(fit: Fit, errors: list[Errors], calibration: Calibration) -> Iterator[str]:
    """What came out, as the page of the documentation."""
    yield from INTRODUCTION.splitlines()
    yield "| software | rows | median error, left out | twins out | largest, left out |"
    yield "|---|---:|---:|---:|---:|"
    for stack in [*fit.stacks, None]:
        each = [error for row, error in zip(fit.rows, errors, strict=True) if stack in (row.stack, None)]
        left, twins = ([abs(getattr(error, kind)) for error in each] for kind in ("left_out", "twins_out"))
        name = stack or "all"
        yield f"| {name} | {len(each)} | {median(left):.1%} | {median(twins):.1%} | {max(left):.0%} |"
    yield ""
    yield from HARD_ROWS.splitlines()
    yield from deepseek(fit, errors, calibration)
    yield from ("", "## Every row", "")
    yield "A layout is tensor/pipeline/stages on a rank/context/expert, a batch sequences x those of a microbatch."
    yield ""
    heads = ("software", "device", "model", "GPUs, format, layout, batch")
    yield f"| {' | '.join(heads)} | published tokens/s/GPU | fit | left out | twins out |"
    yield "|---|---|---|---|---:|---:|---:|---:|"
    for row, error in zip(fit.rows, errors, strict=True):
        shown = " | ".join(f"{each:+.0%}" for each in (error.fit, error.left_out, error.twins_out))
        yield f"| {row.stack} | {row.hardware} | {row.model} | {row.layout} | {row.published:,.0f} | {shown} |"


INTRODUCTION = """\
# How wrong the model of time is

`plan` predicts the time of a step from rates that are fitted to published throughput. This page is the output of
`python benchmarks/plan_calibration.py`: every row that it was fitted to, and how well it is predicted from the others.
An error is predicted over published tokens per second, less 1. The rates, one slowdown in all and one for experts for
each software, and one slowdown for each device are fitted without the row that is predicted; "twins out" also leaves
out every other row of the same model on the same device, in whatever software.

The rows are those that NVIDIA publishes for Megatron Bridge (docs/performance-summary.md and its archive, releases
25.09 to 26.08; formats below FP8, fully sharded and token-dropping rows left out), and DeepSeek's own (arXiv
2412.19437: 180,000 H800 hours per trillion tokens). Rows without a layout cannot be predicted: torchtitan's DeepSeek-V3
on 256 B200 (651, 859 and 918 tokens/s per GPU) and Megatron Core's report (1,233 and 1,048 TFLOP/s on GB300 and GB200).

"""

HARD_ROWS = """\
Rows that stay hard:

- Qwen3 30B in 25.11 on B200 and H100: half as fast as predicted. Microbatches are small and CUDA graphs came later, so
  that launches bound them; the next releases are two to three times as fast.
- Qwen3 235B in 26.02 on B300: half as fast as predicted; the next release more than doubled it with another layout.
- DeepSeek-V3 in 26.04 on B200, experts over four nodes: twice as fast as predicted. Its recipe hides the exchange under
  computation, which only the schedule dualpipev says in a spec.
- Qwen3 235B on B200 and gpt-oss on B300: 40% slower than predicted, and half as fast as on the next device; we know no
  reason.

One number for a release cannot tell its recipes apart, and the median says nothing about these.
"""


def deepseek(fit: Fit, errors: list[Errors], calibration: Calibration) -> Iterator[str]:
    """DeepSeek's own account of its training beside the plan of the shipped spec."""
    spec, hardware = load(str(ROOT / "specs" / "deepseek-v3.yaml")), load_hardware("h800")
    planned = training(spec, hardware, speed(calibration, hardware, DEEPSEEK))
    pretraining, extension = planned.stages[0].gpu_hours, sum(stage.gpu_hours for stage in planned.stages[1:])
    own = next(error for row, error in zip(fit.rows, errors, strict=True) if row.stack == DEEPSEEK)
    yield from ("", "## DeepSeek-V3's own figures", "")
    yield "| | planned | published | error |"
    yield "|---|---:|---:|---:|"
    rows = (
        ("pre-training, 14.8T tokens, 2,048 H800; GPU hours", pretraining, PRETRAINING),
        ("the same, hours per trillion tokens", pretraining / 14.8, 180e3),
        ("context extension, two stages of 1,000 steps", extension, EXTENSION),
        ("post-training, quoted: no recipe to plan", POST_TRAINING, POST_TRAINING),
        ("in all", pretraining + extension + POST_TRAINING, TOTAL),
        ("in all, at $2 an hour", 2 * (pretraining + extension + POST_TRAINING), 2 * TOTAL),
    )
    for label, ours, theirs in rows:
        yield f"| {label} | {ours:,.0f} | {theirs:,.0f} | {ours / theirs - 1:+.1%} |"
    yield ""
    yield "The rate of the software is fitted to the pre-training row itself; predicted from all other rows, its tokens"
    yield f"per second are {own.left_out:+.0%} off. Context extension is predicted from pre-training: the report says"
    yield "neither its layout nor what else is in its hours; of it the spec knows two stages of 1,000 steps."


def _calibration(fit: Fit, parameters: np.ndarray, errors: list[Errors]) -> Calibration:
    by_stack = {
        stack: [abs(error.left_out) for row, error in zip(fit.rows, errors, strict=True) if row.stack == stack]
        for stack in fit.stacks
    }
    rates, stacks, experts, devices = (np.exp(part) for part in fit.split(parameters))
    grouped = {device: round(float(factor), 3) for device, factor in zip(fit.devices, devices, strict=True)}
    grouped |= {device: grouped[group] for device, group in DEVICE_GROUPS.items()}
    return Calibration(
        summary=f"{len(fit.rows)} published rows, benchmarks/plan_calibration.py",
        rates=Rates(**{kind: float(f"{rate:.4g}") for kind, rate in zip(fit.kinds, rates, strict=True)}),
        stacks={
            stack: Stack(
                software=stack.partition("-2")[0],
                release=stack[len(stack.partition("-2")[0]) + 1 :],
                slowdown=round(float(slowdown), 3),
                experts=round(float(of_experts), 3),
                rows=len(by_stack[stack]),
                error=round(median(by_stack[stack]), 3) if len(by_stack[stack]) > 1 else None,
            )
            for stack, slowdown, of_experts in zip(fit.stacks, stacks, experts, strict=True)
        },
        devices=dict(sorted(grouped.items())),
    )


def _json(fit: Fit, errors: list[Errors], calibration: Calibration) -> dict[str, Any]:
    return {
        "command": "python " + " ".join(sys.argv),
        "machine": f"{platform.machine()}, {platform.system()}: arithmetic alone",
        "median_left_out_error": median(abs(error.left_out) for error in errors),
        "calibration": calibration.model_dump(),
        "rows": [
            {
                "stack": row.stack,
                "hardware": row.hardware,
                "spec": row.model,
                "layout": row.layout,
                "published_tokens_per_second_per_gpu": row.published,
                **{f"{kind}_error": round(getattr(error, kind), 4) for kind in ("fit", "left_out", "twins_out")},
            }
            for row, error in zip(fit.rows, errors, strict=True)
        ],
    }


if __name__ == "__main__":
    main()
