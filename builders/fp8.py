"""FP8 training: which layers of a built model compute in FP8, and how each gets its weight in it.

`to_fp8` puts another class in the place of linear layers and experts, with the same parameters under the same names:
checkpoints, optimizer and initial values know nothing of it. What stays as it is: embedding, head, router, norms, the
core of attention, the indexer, the gate of shared experts (`schema.in_fp8` is the rule).

A weight is quantised when it is first read after it has changed. torch counts up the version of a tensor at changes in
place, but its fused optimizers do not; so a weight is also quantised anew once it got a gradient, unless the optimizer
is known to count (`versions_tell`). Then that is once per optimizer step, however many microbatches the step has.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from weakref import ref

import torch
from torch import Tensor, nn

from modelspec import schema
from modelspec.builders.ffn.moe import Experts
from modelspec.builders.ffn.router import Choice
from modelspec.builders.layers import Linear, SwiGLU
from modelspec.kernels.device import has_fp8
from modelspec.kernels.experts import Experts as ExpertWeights
from modelspec.kernels.fp8_experts import ExpertLayers, fp8_experts
from modelspec.kernels.fp8_health import Health
from modelspec.kernels.fp8_linear import Latest, Layer, Recipe, Sides, fp8_gated_linear, fp8_linear
from modelspec.kernels.quantize_weight import quantize_weight

# The blocks that the kernels are written for.
ACTIVATION_BLOCK, WEIGHT_BLOCK = (1, 128), (128, 128)


class Policy:
    """What all FP8 layers of a model share: the recipe, the input that came last in FP8, and who counts what FP8 loses,
    while somebody does.
    """

    def __init__(self, fp8: schema.FP8) -> None:
        self.fp8 = fp8
        gemms = fp8.gemms
        self.recipe = Recipe("forward" in gemms, "dgrad" in gemms, "wgrad" in gemms, fp8.scales == "ue8m0")
        self.health: Health | None = None
        self.latest = Latest()
        # Whether every change of a weight counts up its version, or is told by `weights_changed`.
        self.versions_tell = False
        self.changes = 0

    def weights_changed(self) -> None:
        """Says that weights changed where their versions do not: through other tensors over the same memory."""
        self.changes += 1


class NarrowWeight:
    """A parameter in FP8, [out, in] or [experts, out, in], as long as the parameter does not change."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.sides = Sides()
        self._of: tuple[object, ...] = ()
        # Not its id: a tensor that is gone leaves that to another.
        self._weight: Callable[[], Tensor | None] = lambda: None
        self._noted: Callable[[], Tensor | None] = lambda: None
        self._counted_by: Health | None = None
        self._got_gradient = False

    def layer(self, weight: Tensor) -> Layer:
        """How to compute with the weight now."""
        # A compiled layer cannot ask for a version; `renew` was called before it.
        if not torch.compiler.is_compiling():
            self.renew(weight)
            self._count(weight)
            return Layer(self.policy.recipe, self.sides, self.policy.health, self.policy.latest)
        return Layer(self.policy.recipe, self.sides)

    def renew(self, weight: Tensor) -> None:
        """Quantises the weight if it is not, or may not be, what was quantised last."""
        recipe = self.policy.recipe
        if not (recipe.forward or recipe.dgrad):
            return
        # An inference tensor has no version.
        version = object() if weight.is_inference() else weight._version
        of = (version, weight.untyped_storage()._cdata, weight.device, weight.dtype, self.policy.changes)
        if of == self._of and self._weight() is weight and (self.policy.versions_tell or not self._got_gradient):
            return
        if weight.requires_grad and self._noted() is not weight:
            weight.register_post_accumulate_grad_hook(self._note)
            self._noted = ref(weight)
        # What a first pass for inference makes must do for training too.
        with torch.inference_mode(False), torch.no_grad():
            self.sides = Sides(*quantize_weight(weight.detach(), recipe.ue8m0))
            self._of, self._weight, self._got_gradient = of, ref(weight), False

    @torch.no_grad()
    def _count(self, weight: Tensor) -> None:
        """Shows the weight to whoever counts, once: it may have been quantised before they came."""
        health = self.policy.health
        if health is not None and self._counted_by is not health and self.sides.q is not None:
            health.count("weight", weight.detach().flatten(0, -2), self.sides.q.flatten(0, -2))
        self._counted_by = health

    def _note(self, _: Tensor) -> None:
        self._got_gradient = True


class FP8Linear(Linear):
    """`Linear` with its products in FP8; `keep_e5m6` is for the input of attention's output projection."""

    def __init__(self, linear: Linear, policy: Policy, keep_e5m6: bool) -> None:
        nn.Module.__init__(self)
        self.weight = linear.weight
        self.register_parameter("bias", linear.bias)
        self.narrow = NarrowWeight(policy)
        self.keep_e5m6 = keep_e5m6
        # Whether an input is there in the backward pass anyway, so that it need not be kept in FP8.
        self.kept_elsewhere: Callable[[Tensor], bool] = lambda x: False

    def forward(self, x: Tensor) -> Tensor:
        layer, wide = self.narrow.layer(self.weight), self.kept_elsewhere(x)
        y = fp8_linear(x, self.weight, layer, keep_e5m6=self.keep_e5m6, keep_wide=wide)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def of_gated(self, gate: Tensor, up: Tensor, swiglu: SwiGLU) -> Tensor:
        """The layer of the activation of gate and up, which are kept in FP8."""
        y = fp8_gated_linear(gate, up, self.weight, self.narrow.layer(self.weight), swiglu.gating)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def renew(self) -> None:
        """Makes the FP8 weight follow its parameter."""
        self.narrow.renew(self.weight)


class FP8SwiGLU(SwiGLU):
    """`SwiGLU` that keeps the activation's input in FP8 for the backward pass; its layers are FP8Linear."""

    def __init__(self, swiglu: SwiGLU) -> None:
        nn.Module.__init__(self)
        self.gating = swiglu.gating
        self.gate_proj, self.up_proj, self.down_proj = swiglu.gate_proj, swiglu.up_proj, swiglu.down_proj

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.down_proj, FP8Linear)
        return self.down_proj.of_gated(self.gate_proj(x), self.up_proj(x), self)


class FP8Experts(Experts):
    """`Experts` with their products in FP8."""

    def __init__(self, experts: Experts, policy: Policy) -> None:
        nn.Module.__init__(self)
        self.gating = experts.gating
        self.gate_up_proj, self.down_proj = experts.gate_up_proj, experts.down_proj
        self.register_parameter("gate_up_bias", experts.gate_up_bias)
        self.register_parameter("down_bias", experts.down_bias)
        self.fp8 = policy.fp8
        self.narrow_gate_up, self.narrow_down = NarrowWeight(policy), NarrowWeight(policy)

    def forward(self, x: Tensor, choice: Choice) -> Tensor:
        weights = ExpertWeights(self.gate_up_proj, self.down_proj, self.gate_up_bias, self.down_bias)
        layers = ExpertLayers(
            self.narrow_gate_up.layer(self.gate_up_proj),
            self.narrow_down.layer(self.down_proj),
            narrow=self.fp8.swiglu_input is not None,
            dispatch=self.fp8.dispatch,
        )
        return fp8_experts(x, choice.experts, choice.weights, weights, layers, self.gating)

    def renew(self) -> None:
        """Makes the FP8 weights follow their parameters."""
        self.narrow_gate_up.renew(self.gate_up_proj)
        self.narrow_down.renew(self.down_proj)


def to_fp8(model: nn.Module, fp8: schema.FP8) -> None:
    """Puts FP8 layers in the place of those whose products `fp8` is about; parameters and their names stay."""
    policy = Policy(fp8)
    for name, module in list(model.named_modules()):
        owner, _, leaf = name.rpartition(".")
        if isinstance(module, Experts):
            setattr(model.get_submodule(owner), leaf, FP8Experts(module, policy))
        elif isinstance(module, Linear) and schema.in_fp8(f"{name}.weight"):
            # The projection of attention's output, by whichever name a variant has for it.
            keep_e5m6 = fp8.attention_output is not None and leaf in ("o_proj", "out_proj")
            setattr(model.get_submodule(owner), leaf, FP8Linear(module, policy, keep_e5m6))
    if fp8.swiglu_input is not None:
        for name, module in list(model.named_modules()):
            if isinstance(module, SwiGLU):
                owner, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(owner), leaf, FP8SwiGLU(module))
    model.register_forward_pre_hook(_renew)


def _renew(model: nn.Module, _: object) -> None:
    for module in model.modules():
        # A weight that is divided between ranks is made in FP8 when it is gathered, at its layer.
        whole = all(type(parameter) is nn.Parameter for parameter in module.parameters(recurse=False))
        if isinstance(module, FP8Linear | FP8Experts) and whole:
            module.renew()


def policy_of(model: nn.Module) -> Policy | None:
    """What the FP8 layers of a model share; None where it has none."""
    for module in model.modules():
        if isinstance(module, FP8Linear):
            return module.narrow.policy
        if isinstance(module, FP8Experts):
            return module.narrow_down.policy
    return None


@contextmanager
def watched(model: nn.Module, health: Health | None) -> Iterator[None]:
    """Lets `health` count what FP8 loses in the model while the block runs."""
    policy = policy_of(model) if health is not None else None
    if policy is None:
        yield
        return
    policy.health = health
    try:
        yield
    finally:
        policy.health = None


def uncomputable(spec: schema.ModelSpec, device: torch.device | None = None) -> Iterator[tuple[str, str, str]]:
    """What keeps `precision.fp8` of a spec from being computed, on a device if one is given: path, message and help.

    Found from the spec alone, before anything is allocated.
    """
    fp8 = spec.precision.fp8
    if fp8 is None:
        return
    which = schema.fp8_weights(spec.tensors())
    if fp8.activation_block != ACTIVATION_BLOCK or fp8.weight_block != WEIGHT_BLOCK:
        for key, has, block in (
            ("activation_block", fp8.activation_block, ACTIVATION_BLOCK),
            ("weight_block", fp8.weight_block, WEIGHT_BLOCK),
        ):
            if has != block:
                message = f"there are no kernels for blocks of {_times(has)}; {which} would need them"
                yield f"precision.fp8.{key}", message, f"set precision.fp8.{key}=[{block[0]}, {block[1]}]"
    if spec.precision.compute == "float64":
        message = f"FP8 products give BF16 or FP32, not FP64, in {which}"
        yield "precision.compute", message, "set precision.compute=float32, or precision.fp8=null"
    if device is not None and device.type != "meta" and not fp8.emulate and not has_fp8(device):
        message = f"{device} has no FP8 for the products of {which}"
        yield "precision.fp8", message, "set precision.fp8=null, or precision.fp8.emulate=true (same numbers, slowly)"


def _times(block: tuple[int, int]) -> str:
    return f"{block[0]} x {block[1]}"
