"""What plan says of ranks, beside what they hold and send: state, what autograd keeps, bytes of collectives.

    python -m benchmarks.plan_layouts [--write]

Every layout trains a small model with all of V3's mechanisms on gloo, and every rank is held against plan.
`--write` writes benchmarks/results/plan-layouts.json and docs/plan-layouts-accuracy.md; exits 1 where a figure is off.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import torch.distributed as dist

from modelspec.layout import mesh
from modelspec.plan.ranks import Batch, rank_memory
from modelspec.plan.traffic import all_traffic
from modelspec.schema import ModelSpec
from modelspec.schema.parallelism import Recompute
from tests.builders.parallel.held import measure
from tests.builders.parallel.layouts import layout, small
from tests.builders.parallel.ranks import run_ranks

ROOT = Path(__file__).parents[1]
RESULT, PAGE = ROOT / "benchmarks" / "results" / "plan-layouts.json", ROOT / "docs" / "plan-layouts-accuracy.md"
BATCH, LENGTH = 8, 64
STATE = "parameters", "gradients", "moments", "counters"
ACTIVATIONS, SENT = 0.15, 0.01


def again(item: str) -> str:
    """What is computed again, as an override."""
    return f"parallelism.recompute=[{item}]"


# Groups of experts that nodes hold.
NODES = ("model.ffn.moe.router.selection.groups={num: 2, topk: 1}",)
EXPERT = layout(4, expert=2, zero=1, microbatch=2)
CONTEXT = layout(4, context=2, zero=1, microbatch=2)
FOUR = {
    "data": layout(4),
    "zero 1": layout(4, zero=1, microbatch=1),
    "zero 2": layout(4, zero=2, microbatch=1),
    "zero 3": layout(4, zero=3, microbatch=1),
    "zero 1, 2 replicas": layout(4, zero=1, replicate=2, microbatch=1),
    "1f1b": layout(4, pipeline="1f1b"),
    "interleaved 1f1b": layout(4, pipeline="interleaved_1f1b"),
    "dualpipev": layout(4, pipeline="dualpipev"),
    "pipeline and zero 3": layout(4, pipeline="1f1b", stages=2, zero=3),
    "pipeline and zero 2": layout(4, pipeline="1f1b", stages=2, zero=2),
    "interleaved zero bubble and zero 2": layout(4, pipeline="interleaved_zero_bubble", stages=2, zero=2),
    "zbv and zero 3": layout(4, pipeline="zbv", stages=2, zero=3),
    "dualpipev, expert and zero 3": layout(4, pipeline="dualpipev", stages=2, expert=2, zero=3, microbatch=1),
    "expert": layout(4, expert=4),
    "expert and data": EXPERT,
    "expert by node": (*layout(4, expert=4, gpus_per_node=2), *NODES),
    "tensor and data": layout(4, tensor=2, zero=1, microbatch=2),
    "context and data": CONTEXT,
    "pipeline and expert": layout(4, pipeline="1f1b", stages=2, expert=2),
    **{f"expert and data, {item} again": (*EXPERT, again(item)) for item in get_args(Recompute)},
    **{f"context and data, {item} again": (*CONTEXT, again(item)) for item in ("mla_up_projection", "layer")},
    "context and data, all three again": (*CONTEXT, again("norm, mla_up_projection, swiglu")),
}
EIGHT = {"four axes": layout(8, pipeline="1f1b", stages=2, tensor=2, expert=4, zero=1, microbatch=1)}
WORLDS = {4: FOUR, 8: EIGHT}


def spec_of(overrides: tuple[str, ...]) -> ModelSpec:
    """The small model in a layout, in sequences of LENGTH tokens."""
    return small(f"training.stages.0.sequence_length={LENGTH}", *overrides)


def predicted(spec: ModelSpec) -> list[dict[str, Any]]:
    """What plan says of every pipeline rank."""
    rows = rank_memory(spec, Batch(LENGTH, BATCH, 1.0))
    sent = all_traffic(spec, BATCH, LENGTH, spec.parallelism.gpus_per_node)
    found = []
    for row, transfers in zip(rows, sent, strict=True):
        told: dict[str, float] = {}
        for each in transfers:
            if "naive" not in each.name:
                key = f"{each.axis} {each.collective}"
                told[key] = told.get(key, 0.0) + each.bytes
        found.append(
            {
                "parameters": row.weights + row.master,
                "gradients": row.gradients,
                "moments": row.optimizer - row.counters,
                "counters": row.counters,
                "activations": row.activations + row.logits,
                "sent": told,
            }
        )
    return found


def measure_all(layouts: dict[str, tuple[str, ...]], file: Path) -> None:
    """On every rank: what it holds and sends under each layout; rank 0 writes those of all."""
    found = {}
    for name, overrides in layouts.items():
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, asdict(measure(spec_of(overrides), BATCH, LENGTH)))
        found[name] = everyone
    if dist.get_rank() == 0:
        file.write_text(json.dumps(found))


def measured(world: int, layouts: dict[str, tuple[str, ...]]) -> dict[str, list[dict[str, Any]]]:
    """Of each layout what every rank holds and sends, in one launch."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        run_ranks(measure_all, world, layouts, file, timeout=300)
        found: dict[str, list[dict[str, Any]]] = json.loads(file.read_text())
    return found


def errors(spec: ModelSpec, ranks: list[dict[str, Any]]) -> dict[str, float]:
    """By how much plan is off, as a share of what was measured: of each figure on the rank where that is most."""
    said, each = predicted(spec), len(ranks) // mesh(spec.parallelism).pipeline
    worst: dict[str, float] = {}
    state = [key for key in STATE if key != "counters" or spec.parallelism.data.zero != 1]
    for rank, found in enumerate(ranks):
        plan = said[rank // each]
        pairs = {key: (plan[key], found[key]) for key in (*state, "activations")}
        for key in {*plan["sent"], *found["sent"]}:
            pairs[key] = plan["sent"].get(key, 0.0), found["sent"].get(key, 0)
        for key, (guess, truth) in pairs.items():
            error = (guess - truth) / truth if truth else float(guess > 0)
            if abs(error) >= abs(worst.get(key, 0.0)):
                worst[key] = error
    return worst


def bound(key: str) -> float:
    """By how much a figure may be off."""
    return 0.0 if key in STATE else ACTIVATIONS if key == "activations" else SENT


def page(rows: dict[str, dict[str, float]]) -> str:
    """The table for readers."""
    lines = [
        _HEAD,
        f"Over {len(rows)} layouts:",
        "",
        "| layout | state | activations | what is sent |",
        "|---|---:|---:|---:|",
    ]
    for name, found in rows.items():
        state = max((found[key] for key in STATE if key in found), key=abs)
        sent = max((error for key, error in found.items() if " " in key), key=abs, default=0.0)
        lines.append(f"| {name} | {state:+.2%} | {found['activations']:+.1%} | {sent:+.2%} |")
    return "\n".join(lines) + "\n"


_HEAD = """# How wrong plan is about ranks

`python -m benchmarks.plan_layouts --write` trains a small model with all of DeepSeek-V3's mechanisms in each layout,
over gloo on CPUs, and holds every rank of the second step against `plan`. The table has the error on the rank where it
is largest.

State is parameters, gradients, moments and the optimizer's counters, each at its most in the step; it must be equal to
the byte. Activations are what autograd keeps at its most, and may be off by 15%. Where something is computed again
they are all that a forward pass made and that outlives it, as [in one process](plan-memory-accuracy.md). What is sent
is counted by axis and collective, each of which may be off by 1%; the column has the worst of them. Layers that are
computed again repeat their collectives. The routers' choice is made even here, since plan takes the mean.

Left out:

- How often each expert was chosen, and the sums of losses and of the gradient's norm: some numbers in a step.
- The optimizer's counters under ZeRO 1, 4 bytes for each tensor: plan takes an even share of them, while a rank has
  those of all tensors that it has a part of.
- Shares that do not come out even: sizes here are multiples of the ranks. ZeRO 1 pads by less than one element per
  rank, FSDP by less than one row of a tensor; plan rounds up once for all tensors together.
- What torch's pipeline stages keep beside autograd: the output of each microbatch until its backward pass.
- Weights that ZeRO 3 gathers while layers compute, without a pipeline; narrower formats than FP32.
"""


def main() -> int:
    """Measures every layout."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write the results and the page")
    parser.add_argument("--only", nargs="+", default=[], help="names of layouts")
    args = parser.parse_args()
    rows, raw = {}, {}
    for world, layouts in WORLDS.items():
        chosen = {name: each for name, each in layouts.items() if not args.only or name in args.only}
        for name, ranks in (measured(world, chosen) if chosen else {}).items():
            rows[name], raw[name] = errors(spec_of(chosen[name]), ranks), ranks
    for name, found in rows.items():
        off = {key: f"{error:+.2%}" for key, error in found.items() if abs(error) > bound(key)}
        print(f"{name:30} activations {found['activations']:+.1%}", off or "")
    if args.write:
        machine = {"torch": version("torch"), "command": "python -m benchmarks.plan_layouts --write"}
        RESULT.write_text(json.dumps({"machine": machine, "errors": rows, "measured": raw}, indent=1) + "\n")
        PAGE.write_text(page(rows))
    return int(any(abs(error) > bound(key) for found in rows.values() for key, error in found.items()))


if __name__ == "__main__":
    sys.exit(main())
