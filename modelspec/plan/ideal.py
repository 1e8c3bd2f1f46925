"""Ideal seconds: what each kind of work would take if a device ran it at the peak that bounds it.

A pass over a layer is matrix products, bounded by arithmetic, of which small ones (few rows for an expert) stay far
from it; the core of attention; everything else, bounded by the memory; waiting; and exchange. How far a real system
stays behind the peaks differs by kind: `Rates` has it. A time is the sum of ideal seconds times rates.

A layer has three passes: forward, the gradient of the input, the gradient of the weights. Each product stands once in
each; attention's core takes two and a half in the gradient of its input, because it computes the scores again
(FlashAttention-2, arXiv 2307.08691); what the memory bounds takes as long backwards as twice forwards.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from itertools import chain
from operator import add, attrgetter
from typing import Final, Literal, assert_never

from modelspec.layout import mesh
from modelspec.plan.flops import attention, head, products, up_projections, without_indexer
from modelspec.plan.stages import runs_of_stages
from modelspec.plan.storage import ITEM_BYTES
from modelspec.plan.traffic import Transfer, again_traffic, choice_traffic, layer_traffic
from modelspec.schema import GQA, MLA, Attention, Dense, Dtype, GatedDeltaNet, LayerRun, ModelSpec, MoE, in_fp8
from modelspec.schema.calibration import Rates
from modelspec.schema.hardware import Hardware

Gemm = Literal["forward", "dgrad", "wgrad"]
_GEMMS: Final[tuple[Gemm, ...]] = ("forward", "dgrad", "wgrad")


@dataclass(frozen=True, slots=True)
class Ideal:
    """Ideal seconds by kind; `layer` and `moe_layer` are how often a layer is passed. Field by field as in `Rates`."""

    fp8_products: float = 0.0
    products: float = 0.0
    expert_rows: float = 0.0
    attention: float = 0.0
    residual: float = 0.0
    heads: float = 0.0
    experts: float = 0.0
    quantize: float = 0.0
    layer: float = 0.0
    moe_layer: float = 0.0
    node: float = 0.0
    network: float = 0.0
    tensor: float = 0.0
    data: float = 0.0
    optimizer: float = 0.0

    def __add__(self, other: "Ideal") -> "Ideal":
        return Ideal(*map(add, _values(self), _values(other)))

    def __mul__(self, times: float) -> "Ideal":
        return Ideal(*(times * value for value in _values(self)))

    def seconds(self, rates: Rates) -> dict[str, float]:
        """Seconds of each kind at the rates of a device and a software."""
        return {field.name: getattr(self, field.name) * getattr(rates, field.name) for field in fields(self)}


# dataclasses.astuple copies deeply, which takes thirty times as long.
_values: Callable[[Ideal], tuple[float, ...]] = attrgetter(*(field.name for field in fields(Ideal)))


@dataclass(frozen=True, slots=True)
class Passes:
    """Ideal seconds of the forward pass and of the two halves of the backward pass."""

    forward: Ideal = Ideal()
    input: Ideal = Ideal()
    weight: Ideal = Ideal()

    def __add__(self, other: "Passes") -> "Passes":
        return Passes(self.forward + other.forward, self.input + other.input, self.weight + other.weight)

    @property
    def all(self) -> Ideal:
        """The three together."""
        return self.forward + self.input + self.weight

    def __mul__(self, times: float) -> "Passes":
        return Passes(self.forward * times, self.input * times, self.weight * times)


def stage_passes(
    spec: ModelSpec, tokens: float, sequence_length: int, hardware: Hardware, imbalance: float = 1.0
) -> tuple[Passes, ...]:
    """Every pipeline stage's passes over a microbatch of so many tokens of a tensor group.

    The last stage has the head and multi-token prediction besides its layers. `imbalance` is the load of the busiest
    expert rank over the mean.
    """
    layers = Layers(spec, tokens, sequence_length, hardware, imbalance)
    stages = runs_of_stages(spec.model, mesh(spec.parallelism).stages)
    # Layers that are alike are computed once.
    one = {(run.attention, run.ffn): run for run in chain.from_iterable(stages)}
    each = {halves: layers.passes(run) for halves, run in one.items()}
    found = [sum((each[run.attention, run.ffn] * run.repeat for run in stage), Passes()) for stage in stages]
    found[-1] += layers.head
    if spec.model.mtp is not None:
        found[-1] += (
            layers.mtp_projection + layers.passes(spec.model.mtp_layer()) + layers.head
        ) * spec.model.mtp.depth
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Layers:
    """The parts of a model on a device, for microbatches of so many tokens of a tensor group."""

    spec: ModelSpec
    tokens: float
    sequence_length: int
    hardware: Hardware
    imbalance: float = 1.0

    def passes(self, run: LayerRun) -> Passes:
        """One layer of a run."""
        products, core = self._products(run), self._core(run)
        domain = self.hardware.fast_domain
        exchange = self._exchange(layer_traffic(self.spec, run, self.tokens, domain))
        choice = self._exchange(choice_traffic(self.spec, run, self.tokens, self.sequence_length, domain))
        memory, waiting = self._memory(run), self._waiting(run)
        return Passes(
            products["forward"] + core + memory + waiting + exchange + choice,
            products["dgrad"] + core * 2.5 + memory * 1.5 + waiting + exchange + self._again(run),
            products["wgrad"] + memory * 0.5 + waiting,
        )

    @property
    def head(self) -> Passes:
        """The output head: three products outside of FP8."""
        return _thrice(Ideal(products=self._own * float(head(self.spec.model).learned) / self._peak))

    @property
    def mtp_projection(self) -> Passes:
        """From a representation and an embedding to one, in multi-token prediction."""
        flops = self._own * 2 * 2 * self.spec.model.hidden_size**2
        return Passes(*(self._linear(gemm, flops) for gemm in _GEMMS))

    @property
    def _own(self) -> float:
        """A rank's share of the work of a tensor group: the sequence is cut where matrices are not."""
        return self.tokens / self.spec.parallelism.tensor

    @property
    def _peak(self) -> float:
        return peak(self.hardware, self.spec.precision.compute)

    def _products(self, run: LayerRun) -> dict[Gemm, Ideal]:
        """Products of each pass, in FP8 where `precision.fp8` has the pass and the device can."""
        table = self.spec.model.block_tensors(run)
        linear = {name: tensor for name, tensor in table.items() if in_fp8(name)}
        experts = {name: tensor for name, tensor in linear.items() if tensor.experts_per_token is not None}
        # Router and gates; the indexer, which has no backward pass, is left out.
        others = {name: table[name] for name in table if name not in linear and ".indexer." not in name}
        balanced = self._own * float(products(experts))
        busiest = balanced * self.imbalance
        inner = self._own * float(products(linear)) - balanced + busiest
        outside = Ideal(products=self._own * float(products(others)) / self._peak)
        few = busiest / self._rows_of_expert(run) if experts else 0.0
        return {
            gemm: self._linear(gemm, inner) + outside + Ideal(expert_rows=few / self._rate(gemm)) for gemm in _GEMMS
        }

    def _linear(self, gemm: Gemm, flops: float) -> Ideal:
        """One pass of linear layers and experts."""
        seconds = flops / self._rate(gemm)
        return Ideal(fp8_products=seconds) if self._in_fp8(gemm) else Ideal(products=seconds)

    def _rate(self, gemm: Gemm) -> float:
        """The device's peak for a pass of linear layers; FLOP/s."""
        return (self.hardware.peak_flops.fp8 if self._in_fp8(gemm) else None) or self._peak

    def _in_fp8(self, gemm: Gemm) -> bool:
        fp8 = self.spec.precision.fp8
        return fp8 is not None and gemm in fp8.gemms and self.hardware.peak_flops.fp8 is not None

    def _rows_of_expert(self, run: LayerRun) -> float:
        """Rows of one expert's product, where every expert gets as many."""
        ffn, ranks = self.spec.model.ffn[run.ffn], self.spec.parallelism.expert
        assert isinstance(ffn, MoE), "only experts have rows of their own"
        return self._own * ffn.num_experts_per_tok * ranks / ffn.num_experts

    def _core(self, run: LayerRun) -> Ideal:
        model, variant = self.spec.model, self.spec.model.attention[run.attention]
        table = without_indexer(variant.tensors(model.hidden_size, model.norm))
        work = attention(model, variant, self.sequence_length)
        return Ideal(attention=self._own * float(work.forward - products(table)) / self._peak)

    def _memory(self, run: LayerRun) -> Ideal:
        """One pass over each of what a layer reads and writes."""
        spec = self.spec
        one = self._own * ITEM_BYTES[spec.precision.compute] / self.hardware.memory_bandwidth
        hidden, heads, (rows, act) = (
            spec.model.hidden_size,
            head_widths(spec.model.attention[run.attention]),
            self._ffn(run),
        )
        quantized = 2 * hidden + heads / 2 + rows + act if spec.precision.fp8 else 0.0
        return Ideal(residual=one * hidden, heads=one * heads, experts=one * (rows + 3 * act), quantize=one * quantized)

    def _ffn(self, run: LayerRun) -> tuple[int, int]:
        """Widths per token: of the rows that experts receive, and of what the activation makes."""
        match self.spec.model.ffn[run.ffn]:
            case MoE() as ffn:
                used = ffn.num_experts_per_tok
                return used * self.spec.model.hidden_size, used * ffn.intermediate_size + ffn.shared_width
            case Dense() as ffn:
                return 0, ffn.intermediate_size
            case other:
                assert_never(other)

    def _waiting(self, run: LayerRun) -> Ideal:
        return Ideal(layer=1.0, moe_layer=1.0 if isinstance(self.spec.model.ffn[run.ffn], MoE) else 0.0)

    def _exchange(self, transfers: Iterable[Transfer]) -> Ideal:
        found = Ideal()
        for each in transfers:
            seconds = transfer_seconds(each, self.hardware)
            if each.axis != "expert":
                found += Ideal(tensor=seconds)
            elif each.link == "node":
                found += Ideal(node=seconds * self.imbalance)
            else:
                found += Ideal(network=seconds * self.imbalance)
        return found

    def _again(self, run: LayerRun) -> Ideal:
        """What the backward pass computes again, as `parallelism.recompute` says."""
        recompute, variant = self.spec.parallelism.recompute, self.spec.model.attention[run.attention]
        found = self._exchange(again_traffic(self.spec, run, self.tokens, self.hardware.fast_domain))
        if "layer" in recompute:
            return found + self._products(run)["forward"] + self._core(run) + self._memory(run) + self._waiting(run)
        one = self._own * ITEM_BYTES[self.spec.precision.compute] / self.hardware.memory_bandwidth
        if "norm" in recompute:
            # Two norms, each reading and writing the residual stream, of the passes that `residual` stands for.
            found += Ideal(residual=one * self.spec.model.hidden_size * NORM_SHARE)
        if "swiglu" in recompute:
            found += Ideal(experts=one * self._ffn(run)[1])
        if "mla_up_projection" in recompute and isinstance(variant, MLA):
            forward = self._products(run)["forward"]
            ups = self._own * float(up_projections(self.spec.model, variant))
            peak_fp8 = self.hardware.peak_flops.fp8
            if forward.fp8_products and peak_fp8 is not None:
                found += Ideal(fp8_products=ups / peak_fp8)
            else:
                found += Ideal(products=ups / self._peak)
        return found


# A forward pass of a layer passes its residual stream about ten times, four of them in its two norms.
NORM_SHARE = 0.4


def peak(hardware: Hardware, dtype: Dtype) -> float:
    """Dense FLOP/s of matrix products in a format; what a device lacks runs at the next wider format's rate."""
    rates = hardware.peak_flops
    match dtype:
        case "bfloat16":
            return rates.bfloat16
        case "float32":
            return rates.float32
        case "float64":
            return rates.float64 or rates.float32 / 2


def head_widths(variant: Attention) -> int:
    """Queries, keys, values and outputs of one token; elements."""
    match variant:
        case MLA():
            qk = variant.qk_nope_head_dim + variant.qk_rope_head_dim
            return variant.num_heads * 2 * (qk + variant.v_head_dim)
        case GQA():
            return 2 * (variant.num_heads + variant.num_kv_heads) * variant.head_dim
        case GatedDeltaNet():
            keys = 2 * variant.num_qk_heads * variant.qk_head_dim
            return keys + 2 * variant.num_v_heads * variant.v_head_dim
        case other:
            assert_never(other)


def transfer_seconds(transfer: Transfer, hardware: Hardware) -> float:
    """Seconds of a transfer at the full bandwidth of its link."""
    return transfer.bytes / (hardware.node_bandwidth if transfer.link == "node" else hardware.network_bandwidth)


def _thrice(ideal: Ideal) -> Passes:
    return Passes(ideal, ideal, ideal)
