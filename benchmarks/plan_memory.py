"""What plan says of memory, beside what torch holds: parameters, gradients, moments, and what autograd saves.

python benchmarks/plan_memory.py [--write]

One process on the CPU, one training step. Activations are the storages that autograd saves in the forward pass, each
counted once, seen by saved-tensor hooks. Parameters are none of them, and their copies in `precision.compute` are
counted apart. A check of the hooks themselves: all storages that came with the forward pass and outlive it are counted,
too, so that what an operation keeps behind autograd's back is seen (`unseen`). Where parts of the model are computed
again, it is these storages that are the activations: such parts have hooks of their own.

`--write` writes benchmarks/results/plan-memory.json and docs/plan-memory-accuracy.md.
"""

import argparse
import gc
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from textwrap import fill
from typing import Any, get_args

from modelspec.plan.ranks import Batch, rank_memory
from modelspec.schema import ModelSpec
from modelspec.schema.parallelism import Recompute
from modelspec.validate import load

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "plan-memory.json"
PAGE = ROOT / "docs" / "plan-memory-accuracy.md"
BF16 = "precision.compute=bfloat16"
LONG = "model.max_position=4096"
# What DeepSeek-V3 computed again.
PAPER = ("norm", "mla_up_projection", "swiglu")


@dataclass(frozen=True, slots=True)
class Case:
    """A spec with overrides, a batch of `batch` sequences of `sequence` tokens, and what is computed again."""

    spec: str
    batch: int
    sequence: int
    overrides: tuple[str, ...] = ()
    recompute: tuple[str, ...] = ()

    def load(self) -> ModelSpec:
        """The spec in one process, as one microbatch."""
        alone = "parallelism=null", f"parallelism={{recompute: [{', '.join(self.recompute)}]}}"
        return load(ROOT / self.spec, (*self.overrides, *alone))


def _both(spec: str, batch: int, sequence: int, *overrides: str) -> tuple[Case, Case]:
    return Case(spec, batch, sequence, overrides), Case(spec, batch, sequence, (*overrides, BF16))


CASES: tuple[Case, ...] = (
    *_both("specs/deepseek-v3-nano.yaml", 4, 256),
    Case("specs/deepseek-v3-nano.yaml", 1, 1280),
    *_both("benchmarks/v3-20m.yaml", 8, 256),
    *_both("tests/specs/deepseek-v3-tiny.yaml", 2, 48),
    *_both("tests/specs/deepseek-v3.2-tiny.yaml", 4, 64),
    *_both("tests/specs/deepseek-v2-lite-tiny.yaml", 4, 64),
    *_both("tests/specs/kimi-k2-tiny.yaml", 1, 40),
    *_both("tests/specs/llama-3.1-8b-tiny.yaml", 4, 512, LONG, "model.hidden_size=256"),
    *_both("tests/specs/qwen2.5-7b-tiny.yaml", 2, 64),
    *_both("tests/specs/qwen3-30b-a3b-tiny.yaml", 8, 256, LONG, "model.hidden_size=128"),
    *_both("tests/specs/mixtral-8x7b-tiny.yaml", 4, 64),
    *_both("tests/specs/glm-4.5-tiny.yaml", 2, 64),
    *_both("tests/specs/gpt-oss-20b-tiny.yaml", 2, 48),
    *_both("tests/specs/qwen3-next-80b-a3b-tiny.yaml", 1, 160, LONG),
    *(Case("specs/deepseek-v3-nano.yaml", 4, 256, (), (item,)) for item in get_args(Recompute)),
    Case("specs/deepseek-v3-nano.yaml", 4, 256, (), PAPER),
    Case("specs/deepseek-v3-nano.yaml", 4, 256, (BF16,), PAPER),
    Case("specs/deepseek-v3-nano.yaml", 4, 256, (BF16,), ("layer",)),
    Case("tests/specs/deepseek-v3.2-tiny.yaml", 4, 64, (), ("norm", "layer")),
    Case("tests/specs/llama-3.1-8b-tiny.yaml", 4, 512, (LONG, "model.hidden_size=256"), ("norm", "swiglu")),
    Case("tests/specs/qwen3-next-80b-a3b-tiny.yaml", 1, 160, (LONG, BF16), ("norm", "swiglu")),
    Case("tests/specs/gpt-oss-20b-tiny.yaml", 2, 48, (BF16,), ("swiglu",)),
)


@dataclass(frozen=True, slots=True)
class Bytes:
    """What a step needs in one process."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int


@dataclass(frozen=True, slots=True)
class Measured(Bytes):
    """And beside it: copies of parameters that autograd saves, and storages that stay though it does not save them."""

    copies: int
    unseen: int


def predicted(case: Case) -> Bytes:
    """By arithmetic: no torch."""
    spec = case.load()
    (row,) = rank_memory(spec, Batch(case.sequence, case.batch, 1.0))
    # Where copies are kept for products, the parameters themselves are the master weights.
    parameters = row.master or row.weights
    if row.master:
        parameters += sum(4 * each.numel for each in spec.tensors().values() if each.kind == "buffer")
    return Bytes(parameters, row.gradients, row.optimizer, row.activations + row.logits)


def measured(case: Case) -> Measured:
    """One step, by torch."""
    import torch
    from torch import Tensor
    from torch.multiprocessing.reductions import StorageWeakRef
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    from modelspec.builders import build
    from modelspec.builders.model import LossWeights
    from modelspec.builders.optim import build_optimizer
    from modelspec.builders.recompute import recompute
    from modelspec.schema import AdamW

    torch.set_num_threads(1)
    spec = case.load()
    model = build(spec)
    recompute(model, spec.parallelism.recompute)
    tensors = [*model.parameters(), *model.buffers()]
    own = {tensor.untyped_storage()._cdata for tensor in tensors}
    born: dict[int, tuple[StorageWeakRef, int]] = {}
    copies: set[int] = set()

    class Watch(TorchDispatchMode):
        """Sees every storage that an operation makes, and which of them are copies of parameters."""

        def __torch_dispatch__(
            self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            given = {each.untyped_storage()._cdata for each in tree_leaves(args) if isinstance(each, Tensor)}
            out = func(*args, **(kwargs or {}))
            for tensor in tree_leaves(out):
                storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
                if storage is not None and storage._cdata not in given:
                    born[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                    # An address may be taken again by another storage.
                    copies.discard(storage._cdata)
            if func is torch.ops.aten._to_copy.default and args[0].untyped_storage()._cdata in own:
                copies.add(out.untyped_storage()._cdata)
            return out

    saved: dict[int, tuple[int, Tensor]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = (storage.nbytes(), tensor)
        return tensor

    generator = torch.Generator().manual_seed(0)
    windows = torch.randint(0, spec.model.vocab_size, (case.batch, case.sequence + 1), generator=generator)
    tokens, targets = windows[:, :-1].clone(), windows[:, 1:].clone()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), Watch():
        loss = model(tokens, targets, loss_weights=LossWeights(0.3, 1e-4)).loss
    gc.collect()
    stay = {address: size for address, (reference, size) in born.items() if not reference.expired()}
    given = {*saved, *own, loss.untyped_storage()._cdata}
    unseen = {address: size for address, size in stay.items() if address not in given}
    kept = {address: size for address, (size, _) in saved.items()}
    if spec.parallelism.recompute:
        # Parts of the model have hooks of their own then, which keep what these do not see.
        kept, unseen = kept | unseen, {}
    activations = sum(size for address, size in kept.items() if address not in copies)
    copied = sum(size for address, size in kept.items() if address in copies)
    loss.backward()
    adamw = AdamW(type="adamw", betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    optimizer = build_optimizer(model, adamw, spec.precision)
    optimizer.step()
    return Measured(
        parameters=sum(tensor.nbytes for tensor in tensors),
        gradients=sum(parameter.grad.nbytes for parameter in model.parameters() if parameter.grad is not None),
        optimizer=sum(tensor.nbytes for state in optimizer.state.values() for tensor in state.values()),
        activations=activations,
        copies=copied,
        unseen=sum(unseen.values()),
    )


def page(rows: list[dict[str, Any]]) -> str:
    """The table for readers."""
    errors = [abs(row["predicted"]["activations"] / row["measured"]["activations"] - 1) for row in rows]
    exact = all(row["predicted"][key] == row["measured"][key] for row in rows for key in _EXACT)
    lines = [
        "# How wrong the model of memory is",
        "",
        fill(_METHOD, 120),
        "",
        fill(
            f"Parameters, gradients and moments are {'equal to the byte' if exact else 'NOT equal'} in all {len(rows)} "
            f"cases. Activations are off by {median(errors):.2%} in the median and by {max(errors):.2%} at most: "
            "how many rows the experts' kernel pads depends on what a router chooses.",
            120,
        ),
        "",
        "| spec | batch | compute | recompute | state, measured | activations, predicted | measured | error |",
        "|---|---:|---|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        case, found, said = row["case"], row["measured"], row["predicted"]
        state = sum(found[key] for key in _EXACT)
        error = said["activations"] / found["activations"] - 1
        changed = [text for text in case["overrides"] if text != BF16]
        name = Path(case["spec"]).stem + "".join(f", `{text}`" for text in changed)
        compute = "BF16" if BF16 in case["overrides"] else "FP32"
        lines.append(
            f"| {name} | {case['batch']} x {case['sequence']:,} | {compute} | {', '.join(case['recompute'])} "
            f"| {state:,} | {said['activations']:,} "
            f"| {found['activations']:,} | {error:+.2%} |"
        )
    return "\n".join(lines) + "\n"


_METHOD = (
    "`plan` predicts memory by arithmetic. This page is the output of `python benchmarks/plan_memory.py --write`, "
    "which takes a training step of each spec in one process on the CPU and counts what torch holds: parameters, "
    "gradients and moments after the step, and every storage that autograd saves in the forward pass, once. Copies of "
    "parameters in `precision.compute` are no activations. Nothing else outlives that pass. Where something is "
    "computed again (`parallelism.recompute`), activations are all storages that were made in the forward pass and "
    "outlive it."
)
_EXACT = ("parameters", "gradients", "optimizer")


def machine() -> dict[str, Any]:
    """What the figures belong to."""
    return {"cores": os.cpu_count(), "torch": version("torch"), "command": "python benchmarks/plan_memory.py --write"}


def main() -> None:
    """Measures every case; exits 1 where state is not exact or activations are off by more than 15 %."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the results and the page")
    args = parser.parse_args()
    rows, good = [], True
    for case in CASES:
        found, said = measured(case), predicted(case)
        error = said.activations / found.activations - 1
        exact = all(getattr(found, key) == getattr(said, key) for key in _EXACT)
        good = good and exact and abs(error) <= 0.15
        rows.append({"case": asdict(case), "measured": asdict(found), "predicted": asdict(said)})
        name = f"{Path(case.spec).stem} {case.batch}x{case.sequence} {'BF16' if BF16 in case.overrides else 'FP32'}"
        name += "".join(f" {item}" for item in case.recompute)
        print(f"{name:70} exact {exact} activations {error:+.2%} copies {found.copies:,} unseen {found.unseen:,}")
    if args.write:
        RESULT.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=2) + "\n")
        PAGE.write_text(page(json.loads(RESULT.read_text())["rows"]))
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
