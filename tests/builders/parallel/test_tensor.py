"""Heads, widths and the vocabulary cut over ranks: what one process computes, outputs and gradients, and what is sent.

One launch of four ranks proves all blocks, over all four and over pairs of them; a test reads what came of its case.
"""

import json
from collections.abc import Iterator
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from modelspec import schema
from modelspec.builders.attention import rotary_of
from modelspec.builders.fp8 import to_fp8
from modelspec.builders.model import Transformer
from modelspec.builders.parallel import tensor, vocabulary
from modelspec.builders.parallel.mesh import Axis, mesh
from modelspec.builders.parallel.tensor import cut_dim, local_spec, tensor_parallel
from modelspec.builders.parallel.vocabulary import cross_entropy, embed
from modelspec.diagnostics import SpecError
from modelspec.plan.stages import rank_parameters
from modelspec.plan.state import embedding_held, head_held, layer_held, mtp_held, state
from modelspec.plan.traffic import layer_traffic
from modelspec.schema import ModelSpec
from modelspec.validate import load
from tests.builders.parallel.bytes import Sent
from tests.builders.parallel.ranks import run_ranks

SPECS = Path(__file__).parents[3] / "specs"
WORLD, BATCH, LENGTH, HIDDEN, VOCABULARY = 4, 2, 24, 40, 56
SIZES = (2, 4)

_PLAIN = "{theta: 10000, layout: half_split}"
_MLA = (
    "{type: mla, num_heads: 4, q_lora_rank: 20, kv_lora_rank: 24, qk_nope_head_dim: 12, qk_rope_head_dim: 8, "
    f"v_head_dim: 10, latent_norm_eps: 1.0e-6, rope: {_PLAIN}"
)
_INDEXER = (
    "{type: lightning, num_heads: 3, head_dim: 16, rope_head_dim: 8, rope_layout: half_split, norm_eps: 1.0e-6, "
    "topk: 7}"
)
_DENSE = "{type: dense, intermediate_size: 48, activation: {type: swiglu}"
_MOE = (
    "{type: moe, num_experts: 8, num_experts_per_tok: 3, intermediate_size: 16, activation: {type: swiglu}, "
    "router: {score: sigmoid, selection: {type: topk}, renormalize: true}"
)


def _gqa(heads: int, keys: int, more: str = "") -> str:
    return f"{{type: gqa, num_heads: {heads}, num_kv_heads: {keys}, head_dim: 12, rope: {_PLAIN}{more}}}"


# Attention and feed-forward network of the block.
BLOCKS = {
    "mla and a dense network": (f"{_MLA}}}", f"{_DENSE}}}"),
    "an indexer, biases": (f"{_MLA}, indexer: {_INDEXER}}}", f"{_DENSE}, bias: [gate, up, down]}}"),
    "a key head per rank, biases": (_gqa(8, 4, ", bias: [q, k, v, o]"), f"{_DENSE}, bias: [down]}}"),
    "one key head, norms, a gate": (_gqa(8, 1, ", qk_norm: per_head, output_gate: true"), f"{_DENSE}}}"),
    "two key heads, biases": (_gqa(8, 2, ", bias: [q, k, v, o]"), f"{_DENSE}}}"),
    "two key heads, sinks, a window": (_gqa(4, 2, ", sinks: true, sliding_window: 9"), f"{_DENSE}}}"),
    "shared experts": (f"{_MLA}}}", f"{_MOE}, shared_experts: {{num: 2}}}}"),
    "shared experts with a gate, biases": (
        f"{_MLA}}}",
        f"{_MOE}, bias: [gate, up, down], shared_experts: {{num: 1, intermediate_size: 32, gate: true}}}}",
    ),
    "experts alone": (_gqa(4, 4), f"{_MOE}}}"),
}
BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-6}
FP8 = (
    "{format: e4m3, activation_block: [1, 128], weight_block: [128, 128], scales: float32, "
    "gemms: [forward, dgrad, wgrad], emulate: true, swiglu_input: e4m3}"
)


@cache
def spec_of(block: str, ranks: int = 1, *more: str) -> ModelSpec:
    """A model with this block alone."""
    attention, ffn = BLOCKS[block]
    return load(
        SPECS / "deepseek-v3-nano.yaml",
        [
            "training=null",
            "data=null",
            "model.mtp=null",
            f"model.hidden_size={HIDDEN}",
            f"model.vocab_size={VOCABULARY}",
            "model.attention=null",
            f"model.attention={{it: {attention}}}",
            "model.ffn=null",
            f"model.ffn={{it: {ffn}}}",
            "model.layers=[{attention: it, ffn: it}]",
            f"parallelism={{world_size: {ranks}, tensor: {ranks}}}",
            *more,
        ],
    )


def model_of(spec: ModelSpec, dtype: torch.dtype) -> Transformer:
    """The model that a spec builds, its values not set."""
    return Transformer(spec, dtype, dtype).to(dtype)


def slice_of(x: Tensor, dim: int, axis: Axis) -> Tensor:
    """This rank's part of x."""
    return x.chunk(axis.size, dim)[axis.rank].contiguous()


class Case:
    """A block in a dtype: the model of one process, its input and the gradient of its output."""

    def __init__(self, spec: ModelSpec, dtype: torch.dtype, batch: int = BATCH, length: int = LENGTH) -> None:
        generator = torch.Generator().manual_seed(3)
        self.spec, self.dtype, self.length = spec, dtype, length
        self.whole = model_of(spec, dtype)
        with torch.no_grad():
            for parameter in self.whole.parameters():
                value = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(value * (0.3 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5))
        shape = 2, batch, length, spec.model.hidden_size
        self.x, self.cotangent = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).unbind()

    def part(self, axis: Axis) -> Transformer:
        """This rank's model, with its parts of the values."""
        small = model_of(local_spec(self.spec, axis.size), self.dtype)
        whole = dict(self.whole.named_parameters())
        with torch.no_grad():
            for name, parameter in small.named_parameters():
                dim = cut_dim(name, self.spec)
                parameter.copy_(whole[name] if dim is None else slice_of(whole[name], dim, axis))
        return small

    def run(self, model: Transformer, x: Tensor, cotangent: Tensor) -> dict[str, Tensor]:
        """The block's output for x, and gradients by name."""
        x = x.clone().requires_grad_()
        (layer,) = model.layers.children()
        out, _ = layer(x, rotary_of(self.spec.model.attention["it"], torch.arange(self.length), self.dtype))
        out.backward(cotangent)
        assert x.grad is not None
        gradients = {name: p.grad for name, p in layer.named_parameters("layers.0") if p.grad is not None}
        return {"output": out.detach(), "input": x.grad, **gradients}


def differences(case: Case, axis: Axis, summed: bool = True) -> dict[str, float]:
    """The relative norm of what differs between this rank's part and the same part of one process."""
    fp8 = case.spec.precision.fp8
    small = case.part(axis)
    if fp8 is not None:
        to_fp8(small, fp8)
        to_fp8(case.whole, fp8)
    tensor_parallel(small, case.spec, axis)
    whole = case.run(case.whole, case.x, case.cotangent)
    part = case.run(small, slice_of(case.x, 1, axis), slice_of(case.cotangent, 1, axis))
    assert whole.keys() == part.keys()
    found = {}
    for name, value in whole.items():
        dim = 1 if name in ("output", "input") else cut_dim(name, case.spec)
        if dim is None and summed:
            dist.all_reduce(part[name], group=axis.group)
        wanted = value if dim is None else slice_of(value, dim, axis)
        found[name] = float((part[name] - wanted).norm() / wanted.norm())
    return found


def bytes_of(block: str, axis: Axis) -> dict[str, tuple[float, float]]:
    """What a rank sends, forward and backward, and what plan says that it does."""
    spec = spec_of(block, axis.size)
    case = Case(spec, torch.float32)
    small = case.part(axis)
    tensor_parallel(small, spec, axis)
    (run,) = spec.model.layers
    assert isinstance(run, schema.LayerRun)
    planned = {each.name: each.bytes for each in layer_traffic(spec, run, BATCH * LENGTH, 8) if each.axis == "tensor"}
    x = slice_of(case.x, 1, axis).requires_grad_()
    (layer,) = small.layers.children()
    with Sent() as forward:
        out, _ = layer(x, rotary_of(spec.model.attention["it"], torch.arange(LENGTH), torch.float32))
    with Sent() as backward:
        out.sum().backward()
    return {
        "forward, gathered": (forward.of("all-gather"), planned["all-gather"]),
        "forward, scattered": (forward.of("reduce-scatter"), planned["reduce-scatter"]),
        "backward, gathered": (backward.of("all-gather"), planned["all-gather"]),
        "backward, scattered": (backward.of("reduce-scatter"), planned["reduce-scatter"]),
        "nothing else": (forward.of() + backward.of(), 2 * sum(planned.values())),
    }


def vocabulary_of(dtype: torch.dtype, axis: Axis) -> dict[str, float]:
    """Embedding and loss of a rank against one process, which computes them in float64."""
    generator = torch.Generator().manual_seed(4)
    tokens, targets = torch.randint(0, VOCABULARY, (2, BATCH, LENGTH), generator=generator).unbind()
    targets[1, 5:9] = -100
    rows, head = (torch.randn(2, VOCABULARY, HIDDEN, generator=generator, dtype=torch.float64) / 4).to(dtype).unbind()
    x, cotangent = torch.randn(2, BATCH, LENGTH, HIDDEN, generator=generator, dtype=torch.float64).to(dtype).unbind()

    true = [each.double().clone().requires_grad_() for each in (rows, x, head)]
    embedded = F.embedding(tokens, true[0])
    embedded.backward(cotangent.double())
    loss = F.cross_entropy((true[1] @ true[2].T).flatten(0, 1), targets.flatten(), reduction="sum")
    (loss * 0.5).backward()

    part = [slice_of(each, dim, axis).clone().requires_grad_() for each, dim in ((rows, 0), (x, 1), (head, 0))]
    here = embed(tokens, part[0], axis)
    here.backward(slice_of(cotangent, 1, axis))
    with mock.patch.object(vocabulary, "CHUNK_ROWS", 20):
        total = cross_entropy(part[1], part[2], targets, axis)
        with torch.no_grad():
            judged = cross_entropy(part[1], part[2], targets, axis)
    (total * 0.5).backward()
    pairs = {
        "embedded": (here, slice_of(embedded, 1, axis)),
        "embedding's gradient": (_grad(part[0]), slice_of(_grad(true[0]), 0, axis)),
        "loss": (total, loss),
        "loss without gradients": (judged, loss),
        "hidden's gradient": (_grad(part[1]), slice_of(_grad(true[1]), 1, axis)),
        "head's gradient": (_grad(part[2]), slice_of(_grad(true[2]), 0, axis)),
    }
    assert total.dtype == torch.promote_types(dtype, torch.float32)
    assert _grad(part[2]).dtype == dtype
    return {name: float(((got.double() - want).norm() / want.norm()).detach()) for name, (got, want) in pairs.items()}


def _grad(x: Tensor) -> Tensor:
    assert x.grad is not None
    return x.grad


def logits_of(axis: Axis) -> int:
    """The most elements that one tensor has while the loss is computed."""
    largest = 0
    rows = 8 * 512

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max(largest, out.numel() if isinstance(out, Tensor) else 0)
            return out

    x = torch.randn(1, rows // axis.size, 8, requires_grad=True)
    head = torch.randn(256 // axis.size, 8, requires_grad=True)
    targets = torch.zeros(1, rows, dtype=torch.int64)
    with Largest():
        cross_entropy(x, head, targets, axis).backward()
    return largest


def with_whole_bias(half: nn.Module, y: Tensor, ranks: int) -> Tensor:
    """A summand that forgets that others add the bias too."""
    return y


def first_head(proj: nn.Module, start: int, length: int) -> None:
    """The wrong head of keys for all ranks but the first ones."""
    proj.register_forward_hook(lambda *call: call[-1].narrow(-1, 0, length))


def ranks(folder: str) -> None:
    """Everything that needs other processes; what each rank found goes to a file."""
    axes = {size: mesh(schema.Parallelism(world_size=WORLD, tensor=size)).tensor for size in SIZES}
    found: dict[str, Any] = {}
    for size, axis in axes.items():
        for block in BLOCKS:
            for dtype in BOUNDS:
                found[f"{block}, {size}, {dtype}"] = differences(Case(spec_of(block, size), dtype), axis)
            found[f"{block}, {size}, bytes"] = bytes_of(block, axis)
        for dtype in (*BOUNDS, torch.bfloat16):
            found[f"vocabulary, {size}, {dtype}"] = vocabulary_of(dtype, axis)
        found[f"logits, {size}"] = {"elements": logits_of(axis)}
    found |= broken(axes[4])
    found["fp8"] = differences(fp8_case(), axes[2])
    everywhere: list[Any] = [None] * WORLD
    dist.all_gather_object(everywhere, found)
    if dist.get_rank() == 0:
        Path(folder, "found.json").write_text(json.dumps(everywhere))


def broken(axis: Axis) -> dict[str, Any]:
    """What comes of rules that are broken on purpose."""
    biased = Case(spec_of("an indexer, biases", axis.size), torch.float64)
    found = {"whole gradients not summed": differences(biased, axis, summed=False)}
    with mock.patch.object(tensor, "_summand", with_whole_bias):
        found["bias counted by every rank"] = differences(biased, axis)
    with mock.patch.object(tensor, "_only", first_head):
        two = Case(spec_of("two key heads, biases", axis.size), torch.float64)
        found["wrong head of keys"] = differences(two, axis)
    return found


def fp8_case() -> Case:
    """A block whose local sides are multiples of 128, so that ranks have the blocks of one process."""
    spec = spec_of(
        "a key head per rank, biases",
        2,
        "model.hidden_size=256",
        "model.attention.it={num_heads: 2, num_kv_heads: 2, head_dim: 128}",
        "model.ffn.it.intermediate_size=256",
        f"precision.fp8={FP8}",
    )
    return Case(spec, torch.float32, batch=1, length=256)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[dict[str, Any]]]:
    """What each rank found."""
    folder = tmp_path_factory.mktemp("tensor")
    run_ranks(ranks, WORLD, str(folder))
    yield json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("block", BLOCKS)
def test_ranks_compute_a_block_as_one_process_does(
    found: list[dict[str, Any]], block: str, size: int, dtype: torch.dtype
) -> None:
    for rank, here in enumerate(found):
        differ = here[f"{block}, {size}, {dtype}"]
        assert {"output", "input", "layers.0.attention.o_proj.weight", "layers.0.ffn_norm.weight"} <= differ.keys()
        assert max(differ.values()) <= BOUNDS[dtype], (rank, differ)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("block", BLOCKS)
def test_ranks_send_what_plan_says(found: list[dict[str, Any]], block: str, size: int) -> None:
    for here in found:
        for sent, said in here[f"{block}, {size}, bytes"].values():
            assert sent > 0
            assert sent == pytest.approx(said, rel=0.01)


@pytest.mark.parametrize("dtype", [*BOUNDS, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_ranks_embed_and_judge_as_one_process_does(found: list[dict[str, Any]], size: int, dtype: torch.dtype) -> None:
    bound = BOUNDS.get(dtype, 1e-2)
    for here in found:
        assert max(here[f"vocabulary, {size}, {dtype}"].values()) <= bound, here[f"vocabulary, {size}, {dtype}"]


@pytest.mark.parametrize("size", SIZES)
def test_the_logits_of_all_tokens_are_never_there(found: list[dict[str, Any]], size: int) -> None:
    for here in found:
        assert here[f"logits, {size}"]["elements"] <= 512 * 256 // size


@pytest.mark.parametrize("rule", ["whole gradients not summed", "bias counted by every rank", "wrong head of keys"])
def test_a_broken_rule_shows(found: list[dict[str, Any]], rule: str) -> None:
    assert max(max(here[rule].values()) for here in found) > 1e-2


def test_layers_in_fp8_are_cut_as_others(found: list[dict[str, Any]]) -> None:
    for here in found:
        # The same values in FP8, but for those that rounding before moved across the border between two of them.
        assert max(here["fp8"].values()) < 2e-3, here["fp8"]


def cuttable(ranks: int) -> Iterator[ModelSpec]:
    """Shipped specs cut over so many ranks, where they can be."""
    for file in sorted(SPECS.glob("*.yaml")):
        over = ["training=null", "data=null", "parallelism=null"]
        try:
            yield load(file, [*over, f"parallelism={{world_size: {ranks}, tensor: {ranks}}}"])
        except SpecError as error:
            assert {each.code for each in error.diagnostics if each.severity == "error"} <= {"MS407", "MS413", "MS414"}


@pytest.mark.parametrize("ranks", [2, 4, 16])
def test_what_a_rank_builds_is_what_the_rule_of_cuts_says(ranks: int) -> None:
    names = set()
    for spec in cuttable(ranks):
        names.add(spec.name)
        local = local_spec(spec, ranks).tensors()
        assert local.keys() == spec.tensors().keys()
        for name, whole in spec.tensors().items():
            shape, dim = list(whole.shape), cut_dim(name, spec)
            if dim is not None:
                shape[dim] //= ranks
            assert local[name].shape == tuple(shape), (spec.name, name)
    assert len(names) > 10


@pytest.mark.parametrize("ranks", [2, 4, 16])
def test_plan_counts_what_a_rank_builds(ranks: int) -> None:
    for spec in cuttable(ranks):
        local = local_spec(spec, ranks).tensors().values()
        parameters = [each.numel for each in local if each.kind == "parameter"]
        tables = [embedding_held(spec), head_held(spec), mtp_held(spec)]
        tables += [layer_held(spec, run) for run in spec.model.expanded_layers()]
        assert state(spec, chain.from_iterable(tables)).parameters == sum(parameters), spec.name
        assert sum(map(sum, rank_parameters(spec))) == sum(parameters), spec.name
