"""How well a hardware file that `plan --measure` calibrates on one spec predicts others.

    OMP_NUM_THREADS=1 python benchmarks/plan_measure.py [--steps 6] [--out FILE.json]

The smallest spec is measured, and the slowdown that makes its plan right predicts its siblings. Steps are timed in
seconds of the processor on one thread, which another program on the machine hardly moves; the least of them counts.
"""

import argparse
import json
import os
from pathlib import Path
from time import process_time

import torch

from modelspec.builders.allocator import keep_freed_memory
from modelspec.builders.learner import Learner
from modelspec.builders.measure import device_name, present
from modelspec.hardware.calibration import calibration
from modelspec.plan.planned import error, slowdown
from modelspec.plan.step import speed
from modelspec.plan.training import training
from modelspec.schema import ModelSpec
from modelspec.timeline import timeline
from modelspec.validate import load

SPEC = "specs/deepseek-v3-nano.yaml"
SIBLINGS = {
    "as it is": [],
    "2 layers": ["model.layers=[{attention: mla, ffn: dense}, {attention: mla, ffn: moe}]"],
    "8 layers": ["model.layers=[{attention: mla, ffn: dense}, {repeat: 7, attention: mla, ffn: moe}]"],
    "4 dense layers": ["model.layers=[{repeat: 4, attention: mla, ffn: dense}]"],
    "width 512": ["model.hidden_size=512"],
    "64 experts": ["model.ffn.moe.num_experts=64"],
    "no multi-token prediction": ["model.mtp=null", "training.losses.mtp=null"],
    "batch 2": ["training.stages.0.batch_size=2"],
    "sequences of 1,024, batch 2": ["training.stages.0.sequence_length=1024", "training.stages.0.batch_size=2"],
    "BF16": ["precision.compute=bfloat16"],
}


def least(spec: ModelSpec, steps: int) -> float:
    """Seconds of the processor of the fastest step after the first."""
    assert spec.training is not None
    learner, first = Learner(spec, spec.training, torch.device("cpu")), next(timeline(spec.training))
    seconds = []
    for _ in range(1 + steps):
        batch = torch.randint(spec.model.vocab_size, (first.batch_size, first.sequence_length + 1))
        began = process_time()
        learner.step(first, batch)
        seconds.append(process_time() - began)
    return min(seconds[1:])


def main() -> None:
    """Measures, prints a row for each sibling and writes all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    keep_freed_memory()
    torch.manual_seed(0)
    hardware, _ = present("cpu")
    pace = speed(calibration(), hardware)
    rows: list[dict[str, object]] = []
    for name, overrides in SIBLINGS.items():
        spec = load(SPEC, overrides)
        came = least(spec, args.steps)
        stage = training(spec, hardware, pace).stages[0]
        if not rows:
            shape = stage.sequence_length, stage.step.batch_size
            factor = slowdown(spec, *shape, hardware, pace, came)
            hardware = hardware.model_copy(update={"slowdown": factor, "stack": pace.stack})
        planned = training(spec, hardware, speed(calibration(), hardware)).stages[0].step.seconds
        rows.append({"spec": name, "measured": came, "planned": planned, "error": error(planned, came)})
        print(f"{name:30} measured {came:7.3f} s  planned {planned:7.3f} s  {error(planned, came):+.1%}", flush=True)
    result = {
        "command": f"OMP_NUM_THREADS={torch.get_num_threads()} python benchmarks/plan_measure.py --steps {args.steps}",
        "machine": f"{device_name(torch.device('cpu'))} of {os.cpu_count()}, torch {torch.__version__}",
        "hardware": hardware.model_dump(mode="json", exclude_none=True),
        "rows": rows,
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
