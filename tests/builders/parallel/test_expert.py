"""Experts on four ranks compute what all of them do on one: outputs, gradients, and bytes on the way as plan has them.

One launch proves everything; a test reads what came of its case.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from modelspec import schema
from modelspec.builders.ffn.moe import Dispatch, Experts, MoE
from modelspec.builders.ffn.router import Choice
from modelspec.builders.fp8 import FP8Experts, Policy
from modelspec.builders.parallel import expert
from modelspec.builders.parallel.expert import Exchange, ExchangeByNode, Narrow, Wide, copies_of, exchange
from modelspec.builders.parallel.mesh import Mesh, mesh
from modelspec.kernels.experts import tokens_per_expert
from modelspec.kernels.op import use
from modelspec.kernels.quantize import dequantize, quantize
from modelspec.plan.traffic import layer_traffic, naive_exchange
from modelspec.validate import load
from tests.builders.parallel.bytes import Sent
from tests.builders.parallel.ranks import run_ranks

SPEC = load(Path(__file__).parents[3] / "specs" / "deepseek-v3-nano-fp8.yaml")
WORLD, EXPERTS, HIDDEN, WIDTH = 4, 16, 160, 48
HERE = EXPERTS // WORLD
# Devices of a node: all ranks share one; two nodes of two; a node for each.
NODES = {"straight": 8, "by node": 2, "a node each": 1}
# Tokens of the ranks; one has none.
TOKENS = (37, 0, 64, 11)


def layout(gpus_per_node: int) -> schema.Parallelism:
    return schema.Parallelism(world_size=WORLD, expert=WORLD, gpus_per_node=gpus_per_node)


def moe_spec(k: int, bias: bool = False, groups: schema.ExpertGroups | None = None) -> schema.MoE:
    given = SPEC.model.ffn["moe"]
    assert isinstance(given, schema.MoE)
    selection = given.router.selection.model_copy(update={"groups": groups})
    sizes = {"num_experts": EXPERTS, "num_experts_per_tok": k, "intermediate_size": WIDTH, "shared_experts": None}
    router = given.router.model_copy(update={"selection": selection})
    return given.model_copy(update={**sizes, "router": router, "bias": ("gate", "up", "down") if bias else ()})


def planned(
    gpus_per_node: int, compute: str, fp8: schema.FP8 | None, hidden: int, groups: schema.ExpertGroups | None
) -> schema.ModelSpec:
    """The spec whose traffic plan tells."""
    ffn = {**SPEC.model.ffn, "moe": moe_spec(2, groups=groups)}
    model = SPEC.model.model_copy(update={"hidden_size": hidden, "ffn": ffn})
    precision = SPEC.precision.model_copy(update={"compute": compute, "fp8": fp8})
    return SPEC.model_copy(update={"model": model, "precision": precision, "parallelism": layout(gpus_per_node)})


def narrow(scales: str, dispatch: bool = True) -> schema.FP8:
    assert SPEC.precision.fp8 is not None
    return SPEC.precision.fp8.model_copy(update={"scales": scales, "dispatch": dispatch})


def moe(dtype: torch.dtype, k: int, favoured: int, bias: bool, fp8: schema.FP8 | None) -> MoE:
    """All experts. With `favoured`, tokens choose among the first so many alone."""
    spec = moe_spec(k, bias)
    generator = torch.Generator().manual_seed(3)
    layer = MoE(spec, HIDDEN, torch.float64 if dtype == torch.float64 else torch.float32)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.1)
        assert layer.router.selection_bias is not None
        layer.router.selection_bias.zero_()
        layer.router.selection_bias[:favoured] = 10.0
    layer = layer.double() if dtype == torch.float64 else layer
    if fp8 is not None:
        layer.experts = FP8Experts(layer.experts, Policy(fp8))
    return layer


def part(layer: MoE, fp8: schema.FP8 | None) -> MoE:
    """The same with this rank's experts alone."""
    mine = MoE(layer.spec, HIDDEN, layer.router.dtype).to(next(layer.parameters()).dtype)
    mine.load_state_dict(layer.state_dict())
    for name, parameter in list(mine.experts.named_parameters()):
        setattr(mine.experts, name, torch.nn.Parameter(own(parameter.detach())))
    if fp8 is not None:
        mine.experts = FP8Experts(mine.experts, Policy(fp8))
    return mine


def own(stacked: Tensor) -> Tensor:
    return stacked.chunk(WORLD)[dist.get_rank()].clone()


def off(found: Tensor, wanted: Tensor) -> float:
    """The norm of the difference, relative to what was wanted."""
    if not wanted.numel():
        return 0.0
    return float((found.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-12))


def differences(
    dispatch: Dispatch,
    dtype: torch.dtype,
    k: int = 4,
    favoured: int = 0,
    bias: bool = False,
    fp8: schema.FP8 | None = None,
    one: schema.FP8 | None = None,
) -> dict[str, float]:
    """How far this rank is from one process, which computes in `one`: output, gradients of x, router and experts."""
    generator = torch.Generator().manual_seed(5)
    whole = moe(dtype, k, favoured, bias, one or fp8)
    mine = part(whole, fp8)
    mine.dispatch = dispatch
    x, weight = (torch.randn(1, sum(TOKENS), HIDDEN, generator=generator, dtype=torch.float64) for _ in range(2))
    results = []
    for layer, split in ((whole, [slice(None)]), (mine, [slice(*_rows())])):
        here = x.to(dtype)[:, split[0]].clone().requires_grad_()
        out, _ = layer(here)
        (out * weight.to(dtype)[:, split[0]]).sum().backward()
        results.append((out.detach(), here.grad))
    (out, grad), (own_out, own_grad) = results
    rows = slice(*_rows())
    assert grad is not None and own_grad is not None
    found = {"output": off(own_out, out[:, rows]), "x": off(own_grad, grad[:, rows])}
    wanted = dict(whole.named_parameters())
    for name, parameter in mine.named_parameters():
        truth, gradient = wanted[name].grad, parameter.grad
        assert truth is not None and gradient is not None
        if name.startswith("experts."):
            found[name] = off(gradient, own(truth))
        else:
            dist.all_reduce(gradient)
            found[name] = off(gradient, truth)
    return found


def _rows() -> tuple[int, int]:
    rank = dist.get_rank()
    return sum(TOKENS[:rank]), sum(TOKENS[: rank + 1])


class Weighing(Experts):
    """Experts that multiply by the weight: nothing to compute."""

    def __init__(self, num: int) -> None:
        torch.nn.Module.__init__(self)
        self.gate_up_proj = torch.nn.Parameter(torch.zeros(num, 1))

    def forward(self, x: Tensor, choice: Choice) -> Tensor:
        return x * choice.weights.to(x.dtype)


def even_choice(tokens: int, groups: schema.ExpertGroups | None) -> Choice:
    """Two experts of each token, all pairs of ranks as often as each other: what plan's averages are over. With groups,
    all pairs of ranks of one group.
    """
    token = torch.arange(tokens)
    first, second = token % WORLD, token // WORLD % WORLD
    if groups is not None:
        each = WORLD // groups.num
        second = first // each * each + second % each
    experts = torch.stack([first * HERE, second * HERE + 1], dim=-1)
    weights = torch.full((tokens, 2), 0.5, requires_grad=True)
    return Choice(experts, weights, weights)


def traffic(
    axes: Mesh,
    gpus_per_node: int,
    compute: str,
    fp8: schema.FP8 | None,
    groups: schema.ExpertGroups | None = None,
) -> dict[str, tuple[float, float]]:
    """Bytes out and home, forward and backward: what this rank sends and what plan says that it does."""
    hidden, tokens = 4096, 64
    spec = planned(gpus_per_node, compute, fp8, hidden, groups)
    run = spec.model.layers[-1]
    assert isinstance(run, schema.LayerRun)
    x = torch.randn(tokens, hidden, dtype=getattr(torch, compute), requires_grad=True)
    dispatch, choice = exchange(axes, fp8), even_choice(tokens, groups)
    network = axes.expert_network if axes.expert_network.size > 1 else axes.expert
    assert network.group is not None
    ranks = tuple(dist.get_process_group_ranks(network.group))
    plan = sum(each.bytes for each in layer_traffic(spec, run, tokens, gpus_per_node) if each.axis == "expert")
    with Sent() as forward:
        out = dispatch(Weighing(HERE), x, choice)
    with Sent() as backward:
        out.backward(torch.ones_like(out))
    found = {"forward": (forward.of(ranks=ranks), plan), "backward": (backward.of(ranks=ranks), plan)}
    if axes.expert_network.size > 1:
        naive = sum(each.bytes for each in naive_exchange(spec, run, tokens, gpus_per_node))
        wire = Wide() if fp8 is None else Narrow(fp8.scales == "ue8m0")
        with Sent() as straight:
            Exchange(axes.expert, wire)(Weighing(HERE), x, choice)
        found["naive"] = straight.of(), naive
    return {name: (float(sent), float(said)) for name, (sent, said) in found.items()}


def recomputed(dispatch: Dispatch) -> dict[str, float]:
    """The exchange again in the backward pass, of a choice that is not made again: gradients, and repeated bytes."""
    layer = part(moe(torch.float32, 4, 0, False, None), None)
    x = torch.randn(TOKENS[dist.get_rank()], HIDDEN, generator=torch.Generator().manual_seed(dist.get_rank()))
    gradients, totals = [], []
    for again in (False, True):
        layer.zero_grad()
        here = x.clone().requires_grad_()
        choice = layer.router(here)
        with Sent() as forward:
            if again:
                out = checkpoint(dispatch, layer.experts, here, choice, use_reentrant=False)
            else:
                out = dispatch(layer.experts, here, choice)
        with Sent() as backward:
            out.square().sum().backward()
        gradients.append([here.grad, *(parameter.grad for parameter in layer.parameters())])
        totals.append((forward.of(), backward.of()))
    equal = all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    (once, back), (first, repeated) = totals
    return {"differ": float(not equal), "first pass": float(first - once), "second pass": float(repeated - back - once)}


def wrong_split(count: Callable[[Tensor, int], Tensor]) -> Callable[[Tensor, int], Tensor]:
    """Counts with a row of the first rank's moved to the second's: a wrong split that all ranks believe."""

    def wrong(choice: Tensor, num: int) -> Tensor:
        counts = count(choice, num)
        if num in (2 * HERE, WORLD * HERE) and int(counts[:HERE].sum()):
            counts[counts[:HERE].argmax()] -= 1
            counts[HERE] += 1
        return counts

    return wrong


def prove(file: Path) -> None:
    """Every case on this rank; what each rank came to is written by the first."""
    told: dict[str, Any] = {}
    for way, gpus_per_node in NODES.items():
        axes = mesh(layout(gpus_per_node))
        told |= {f"{way}: {name}": value for name, value in cases(axes, gpus_per_node)}
    everyone: list[Any] = [None] * WORLD
    dist.all_gather_object(everyone, told)
    if dist.get_rank() == 0:
        file.write_text(json.dumps(everyone))


def cases(axes: Mesh, gpus_per_node: int) -> Iterator[tuple[str, Any]]:
    plain, float64, float32, bfloat16 = exchange(axes, None), torch.float64, torch.float32, torch.bfloat16
    yield "class", type(plain).__name__
    with use("reference"):
        yield "float64", differences(plain, float64)
        yield "float64, biases", differences(plain, float64, bias=True)
        yield "float64, one rank has all", differences(plain, float64, favoured=HERE)
        yield "float64, one expert has all", differences(plain, float64, k=1, favoured=1)
        with mock.patch.object(expert, "tokens_per_expert", wrong_split(tokens_per_expert)):
            yield "wrong split", differences(plain, float64)
        with mock.patch.object(expert, "copies_of", lambda token, *rest: copies_of(token.flip(0), *rest)):
            yield "wrong tokens", differences(plain, float64)
    yield "float32", differences(plain, float32)
    yield "float32, one expert has all", differences(plain, float32, k=1, favoured=1)
    yield "bfloat16", differences(plain, bfloat16)
    yield "bytes, bfloat16", traffic(axes, gpus_per_node, "bfloat16", None)
    yield "bytes, float32", traffic(axes, gpus_per_node, "float32", None)
    nodes = schema.ExpertGroups(num=max(axes.expert_network.size, 1), topk=1, score="max")
    yield "bytes, groups", traffic(axes, gpus_per_node, "bfloat16", None, nodes)
    yield "recomputed", recomputed(plain)
    for scales in ("float32", "ue8m0"):
        fp8 = narrow(scales)
        sent = exchange(axes, fp8)
        yield f"FP8, {scales}", differences(sent, float32, fp8=fp8)
        yield f"FP8 in bfloat16, {scales}, one rank has all", differences(sent, bfloat16, favoured=HERE, fp8=fp8)
        yield f"bytes, FP8, {scales}", traffic(axes, gpus_per_node, "bfloat16", fp8)
    wide = narrow("float32", dispatch=False)
    yield "wide beside FP8", differences(exchange(axes, wide), float32, fp8=wide, one=narrow("float32"))


@pytest.mark.parametrize("ue8m0", [False, True])
@pytest.mark.parametrize("width", [64, 128, 160])
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_rows_in_fp8_are_what_one_process_rounds_them_to(ue8m0: bool, width: int, rows: int) -> None:
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    wire, blocks = Narrow(ue8m0), -(-width // 128)
    messages = wire.packed(x)
    assert messages.shape == (rows, width + blocks * (1 if ue8m0 else 4))
    came = wire.unpacked(messages, like=x[:0])
    assert torch.equal(came, dequantize(*quantize(x, True), x.dtype))
    assert torch.equal(wire.packed(came), messages)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What every case came to, rank by rank."""
    file = tmp_path_factory.mktemp("expert") / "found.json"
    run_ranks(prove, WORLD, file, timeout=120)
    told: list[dict[str, Any]] = json.loads(file.read_text())
    return told


def worst(found: list[dict[str, Any]], case: str) -> dict[str, float]:
    """The largest difference over ranks, by tensor."""
    return {name: max(each[case][name] for each in found) for name in found[0][case]}


@pytest.mark.parametrize("way", NODES)
def test_rows_go_straight_inside_a_node_and_by_node_between_nodes(found: list[dict[str, Any]], way: str) -> None:
    wanted = Exchange if way == "straight" else ExchangeByNode
    assert {each[f"{way}: class"] for each in found} == {wanted.__name__}


@pytest.mark.parametrize("way", NODES)
@pytest.mark.parametrize(
    ("case", "bound"),
    [
        ("float64", 1e-12),
        ("float64, biases", 1e-12),
        ("float64, one rank has all", 1e-12),
        ("float64, one expert has all", 1e-12),
        ("float32", 1e-6),
        ("float32, one expert has all", 1e-6),
        # Partial sums are rounded once more than one process rounds them: the norm of that is 2^-8 at most.
        ("bfloat16", 2**-7),
        ("FP8, float32", 1e-6),
        ("FP8, ue8m0", 1e-6),
        ("FP8 in bfloat16, float32, one rank has all", 2**-7),
        ("FP8 in bfloat16, ue8m0, one rank has all", 2**-7),
    ],
)
def test_ranks_compute_what_one_process_does(found: list[dict[str, Any]], way: str, case: str, bound: float) -> None:
    assert max(worst(found, f"{way}: {case}").values()) < bound


@pytest.mark.parametrize("way", NODES)
@pytest.mark.parametrize("case", ["bfloat16", "float32", "groups", "FP8, float32", "FP8, ue8m0"])
def test_bytes_are_those_that_plan_counts(found: list[dict[str, Any]], way: str, case: str) -> None:
    for each in found:
        for sent, planned in each[f"{way}: bytes, {case}"].values():
            assert sent == pytest.approx(planned, rel=0.01)


@pytest.mark.parametrize("way", NODES)
def test_a_checkpoint_repeats_the_exchange_of_the_same_choice(found: list[dict[str, Any]], way: str) -> None:
    assert set(worst(found, f"{way}: recomputed").values()) == {0.0}


@pytest.mark.parametrize(
    "case",
    ["straight: wrong split", "by node: wrong split", "straight: wrong tokens", "by node: wrong tokens"]
    + [f"{way}: wide beside FP8" for way in NODES],
)
def test_what_is_wrong_is_found(found: list[dict[str, Any]], case: str) -> None:
    assert worst(found, case)["output"] > 1e-2
