"""Sequences cut over ranks: attention computes what one process does, outputs and gradients, and sends what plan says.

One launch of four ranks proves all variants, over all four and over pairs of them; a test reads what came of its case.
"""

import json
from collections.abc import Callable, Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from modelspec import schema
from modelspec.builders.attention import build_attention, rotary_of
from modelspec.builders.attention.gqa import GQA
from modelspec.builders.attention.mla import MLA
from modelspec.builders.parallel import context
from modelspec.builders.parallel.context import CutSequence, cut, positions
from modelspec.builders.parallel.mesh import ALONE, Axis, mesh
from modelspec.kernels.attention import Sight, causal_attention
from modelspec.plan.traffic import choice_traffic, layer_traffic
from modelspec.schema import ModelSpec
from modelspec.validate import load
from tests.builders.parallel.bytes import Sent
from tests.builders.parallel.ranks import run_ranks

SPECS = Path(__file__).parents[3] / "specs"
WORLD, BATCH, LENGTH, HIDDEN, TOPK = 4, 2, 48, 40, 7
SIZES = (2, 4)

_YARN = (
    "{theta: 10000, layout: interleaved, scaling: {type: yarn, factor: 40, original_max_position: 32, beta_fast: 32, "
    "beta_slow: 1, mscale: 1.0, mscale_all_dim: 0.7}}"
)
_PLAIN = "{theta: 10000, layout: half_split}"
_MLA = (
    "type: mla, num_heads: 3, kv_lora_rank: 24, qk_nope_head_dim: 12, qk_rope_head_dim: 8, v_head_dim: 10, "
    "latent_norm_eps: 1.0e-6"
)
_INDEXER = (
    "{type: lightning, num_heads: 3, head_dim: 16, rope_head_dim: 8, rope_layout: half_split, norm_eps: 1.0e-6, "
    f"topk: {TOPK}}}"
)
_GQA = "type: gqa, num_heads: 4, num_kv_heads: 2, head_dim: 12"
VARIANTS = {
    "mla": f"{{{_MLA}, q_lora_rank: 20, rope: {_YARN}}}",
    "mla without a latent of queries": f"{{{_MLA}, q_lora_rank: null, rope: {_PLAIN}}}",
    "mla with an indexer": f"{{{_MLA}, q_lora_rank: 20, indexer: {_INDEXER}, rope: {_YARN}}}",
    "gqa": f"{{{_GQA}, bias: [q, v, o], rope: {_PLAIN}}}",
    "gqa with norms and a gate": f"{{{_GQA}, qk_norm: per_head, output_gate: true, rope_head_dim: 4, rope: {_PLAIN}}}",
    "gqa with a window": f"{{{_GQA}, qk_norm: full, sliding_window: 9, rope: {_PLAIN}}}",
    "gqa with a window and sinks": f"{{{_GQA}, sliding_window: 17, sinks: true, rope: {_YARN}}}",
}
BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-6}


@cache
def spec_of(variant: str, ranks: int = 1) -> ModelSpec:
    """A model with this attention in its one layer."""
    return load(
        SPECS / "deepseek-v3-nano.yaml",
        [
            "training=null",
            "data=null",
            "model.mtp=null",
            f"model.hidden_size={HIDDEN}",
            "model.attention=null",
            f"model.attention={{it: {VARIANTS[variant]}}}",
            "model.layers=[{attention: it, ffn: dense}]",
            "model.ffn.moe=null",
            f"parallelism={{world_size: {ranks}, context: {ranks}}}",
        ],
    )


class Case:
    """One variant in a dtype: the layer, its input and the gradient of its output, of the whole sequence."""

    def __init__(self, variant: str, dtype: torch.dtype) -> None:
        model = spec_of(variant).model
        generator = torch.Generator().manual_seed(5)
        self.spec, self.dtype = model.attention["it"], dtype
        layer = build_attention(self.spec, HIDDEN, model.norm).to(dtype)
        assert isinstance(layer, MLA | GQA)
        self.layer = layer
        with torch.no_grad():
            for parameter in self.layer.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.2)
        whole = torch.randn(2, BATCH, LENGTH, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
        self.x, self.cotangent = whole.unbind()

    def run(self, x: Tensor, cotangent: Tensor, places: Tensor) -> dict[str, Tensor]:
        """The output for x at these positions, and gradients by name."""
        self.layer.zero_grad()
        x = x.clone().requires_grad_()
        out = self.layer(x, rotary_of(self.spec, places, self.dtype))
        out.backward(cotangent)
        assert x.grad is not None
        gradients = {name: p.grad.clone() for name, p in self.layer.named_parameters() if p.grad is not None}
        return {"output": out.detach(), "input": x.grad, **gradients}

    def whole(self) -> dict[str, Tensor]:
        return self.run(self.x, self.cotangent, torch.arange(LENGTH))

    def part(self, axis: Axis) -> dict[str, Tensor]:
        """As `whole` of this rank's positions; gradients of parameters are summed over ranks."""
        with mock.patch.object(self.layer, "sequence", CutSequence(axis)):
            here = self.run(cut(self.x, 1, axis), cut(self.cotangent, 1, axis), positions(LENGTH, axis))
        for name, value in here.items():
            if name not in ("output", "input"):
                dist.all_reduce(value, group=axis.group)
        return here


def differences(variant: str, dtype: torch.dtype, axis: Axis) -> dict[str, float]:
    """The relative norm of what differs between this rank's part and the same part of one process."""
    case = Case(variant, dtype)
    whole, part = case.whole(), case.part(axis)
    assert whole.keys() == part.keys()
    wanted = {name: cut(value, 1, axis) if name in ("output", "input") else value for name, value in whole.items()}
    return {name: float((part[name] - value).norm() / value.norm()) for name, value in wanted.items()}


def bytes_of(variant: str, axis: Axis) -> dict[str, tuple[float, float]]:
    """What a rank sends, forward and backward, and what plan says that it does."""
    case, spec = Case(variant, torch.float32), spec_of(variant, axis.size)
    (run,) = spec.model.layers
    assert isinstance(run, schema.LayerRun)
    tokens = BATCH * LENGTH / axis.size
    gathers = sum(each.bytes for each in layer_traffic(spec, run, tokens, 8) if each.axis == "context")
    chosen = sum(each.bytes for each in choice_traffic(spec, run, tokens, LENGTH, 8))
    here = cut(case.x, 1, axis).requires_grad_()
    with mock.patch.object(case.layer, "sequence", CutSequence(axis)):
        with Sent() as forward:
            out = case.layer(here, rotary_of(case.spec, positions(LENGTH, axis), torch.float32))
        with Sent() as backward:
            out.sum().backward()
    return {
        "forward": (forward.of("all-gather"), gathers + chosen),
        "backward": (backward.of("reduce-scatter"), gathers),
        "nothing else": (forward.of() + backward.of(), 2 * gathers + chosen),
    }


def short(axis: Axis) -> int:
    """Bytes that an indexer gathers of a sequence that is no longer than what a query sees."""
    case = Case("mla with an indexer", torch.float32)
    assert isinstance(case.layer, MLA)
    assert case.layer.indexer is not None
    case.layer.indexer.spec = case.layer.indexer.spec.model_copy(update={"topk": LENGTH})
    here = cut(case.x, 1, axis)
    with Sent() as sent:
        chosen = case.layer.indexer(here, here[..., :20], None, CutSequence(axis))
    assert chosen is None
    return sent.of()


def one_after_the_other(axis: Axis) -> tuple[int, int]:
    """The wrong chunks: neighbours."""
    return 2 * axis.rank, 2 * axis.rank + 1


def unsummed(group: Any) -> Callable[..., None]:
    """A reduce-scatter that forgets the others."""

    def scatter(share: Tensor, whole: Tensor, **_: Any) -> None:
        share.copy_(whole.chunk(dist.get_world_size(group))[dist.get_rank(group)])

    return scatter


def ranks(folder: str) -> None:
    """Everything that needs other processes; the largest of all ranks' findings goes to a file."""
    axes = {size: mesh(schema.Parallelism(world_size=WORLD, context=size)).context for size in SIZES}
    found: dict[str, Any] = {}
    for variant, size in product(VARIANTS, SIZES):
        for dtype in BOUNDS:
            found[f"{variant}, {size}, {dtype}"] = differences(variant, dtype, axes[size])
        found[f"{variant}, {size}, bytes"] = bytes_of(variant, axes[size])
    found["short"] = {"bytes": short(axes[4])}
    with mock.patch.object(context, "_chunks", one_after_the_other):
        found["neighbours"] = differences("mla", torch.float64, axes[4])
    with mock.patch("modelspec.builders.parallel.collectives._scatter", unsummed(axes[4].group)):
        found["unsummed"] = differences("mla", torch.float64, axes[4])
    everywhere: list[Any] = [None] * WORLD
    dist.all_gather_object(everywhere, found)
    if dist.get_rank() == 0:
        Path(folder, "found.json").write_text(json.dumps(everywhere))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[dict[str, Any]]]:
    """What each rank found."""
    folder = tmp_path_factory.mktemp("context")
    run_ranks(ranks, WORLD, str(folder))
    yield json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_parts_of_a_sequence_are_computed_as_by_one_process(
    found: list[dict[str, Any]], variant: str, size: int, dtype: torch.dtype
) -> None:
    for rank, here in enumerate(found):
        differ = here[f"{variant}, {size}, {dtype}"]
        assert {"output", "input", "o_proj.weight"} <= differ.keys()
        assert max(differ.values()) <= BOUNDS[dtype], (rank, differ)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_ranks_send_what_plan_says(found: list[dict[str, Any]], variant: str, size: int) -> None:
    for here in found:
        for sent, said in here[f"{variant}, {size}, bytes"].values():
            assert sent > 0
            assert sent == pytest.approx(said, rel=0.01)


def test_an_indexer_that_has_nothing_to_choose_asks_nobody(found: list[dict[str, Any]]) -> None:
    assert [here["short"]["bytes"] for here in found] == [0] * WORLD


@pytest.mark.parametrize("wrong", ["neighbours", "unsummed"])
def test_a_wrong_order_of_chunks_or_a_lost_sum_shows(found: list[dict[str, Any]], wrong: str) -> None:
    assert max(max(here[wrong].values()) for here in found) > 1e-3


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_every_position_is_on_one_rank_and_cut_takes_it_there(size: int) -> None:
    axes = [Axis(size, rank) for rank in range(size)]
    length = 2 * size * 5
    places = [positions(length, axis) for axis in axes]
    assert all(len(each) == length / size and each.dtype == torch.int64 for each in places)
    assert sorted(torch.cat(places).tolist()) == list(range(length))
    whole = torch.randn(3, length, 2)
    for axis, each in zip(axes, places, strict=True):
        assert torch.equal(cut(whole, 1, axis), whole[:, each])


def test_one_rank_has_sequences_of_any_length_as_they_are() -> None:
    x = torch.randn(2, 7)
    assert cut(x, 1, ALONE) is x
    assert positions(7, ALONE).tolist() == list(range(7))


@pytest.mark.parametrize("size", [2, 4, 8])
def test_ranks_multiply_as_many_queries_with_keys_and_none_the_full_square(size: int) -> None:
    length = 64
    pairs = []
    for rank in range(size):
        counted: list[int] = []

        def count(q: Tensor, k: Tensor, *rest: Any, counted: list[int] = counted) -> Tensor:
            counted.append(q.shape[-2] * k.shape[-2])
            return causal_attention(q, k, *rest)

        axis = Axis(size, rank)
        q, k, v = torch.randn(1, 2, length // size, 4), torch.randn(1, 2, length, 4), torch.randn(1, 2, length, 4)
        with mock.patch.object(context, "causal_attention", count):
            CutSequence(axis).attend(q, k, v, 0.5)
        pairs.append(sum(counted))
    assert max(pairs) <= 1.01 * min(pairs)
    # All of them together: the triangle, and half of each chunk's own square.
    chunk = length // (2 * size)
    assert sum(pairs) == length * (length + chunk) / 2


def test_a_window_reads_no_keys_before_it() -> None:
    length, size, window = 64, 4, 5
    read: list[int] = []

    def count(q: Tensor, k: Tensor, *rest: Any) -> Tensor:
        read.append(k.shape[-2])
        return causal_attention(q, k, *rest)

    whole = [torch.randn(1, 2, length, 4, dtype=torch.float64) for _ in range(3)]
    axis, (q, k, v) = Axis(size, 1), whole
    with mock.patch.object(context, "causal_attention", count):
        part = CutSequence(axis).attend(cut(q, 2, axis), k, v, 0.5, Sight(window=window))
    torch.testing.assert_close(part, cut(causal_attention(q, k, v, 0.5, Sight(window=window)), 2, axis))
    assert read == [8 + window - 1] * 2
