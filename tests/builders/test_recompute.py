"""What is computed again gives the same gradients to the last bit, and is not there in between."""

import gc
import runpy
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from modelspec.builders import Transformer, build
from modelspec.builders.fp8 import watched
from modelspec.builders.model import LossWeights
from modelspec.builders.recompute import recompute
from modelspec.builders.region import Region, Scope
from modelspec.kernels.fp8_health import Health
from modelspec.kernels.op import use
from modelspec.schema import ModelSpec
from modelspec.schema.parallelism import Recompute
from modelspec.validate import load

SPECS = Path(__file__).parents[1] / "specs"
BENCHMARK: dict[str, Any] = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "plan_memory.py"))
PAPER: tuple[Recompute, ...] = ("norm", "mla_up_projection", "swiglu")
POLICIES: list[tuple[Recompute, ...]] = [*((item,) for item in get_args(Recompute)), PAPER, ("norm", "layer")]
BF16 = "precision.compute=bfloat16"
FP8 = (
    "precision.fp8={format: e4m3, activation_block: [1, 128], weight_block: [128, 128], scales: float32, "
    "gemms: [forward, dgrad, wgrad], emulate: true}"
)
# With MLA, experts and multi-token prediction; with an indexer; grouped queries; experts with a limit; a recurrence.
MODELS: dict[str, tuple[str, ...]] = {
    "deepseek-v3-tiny": (),
    "deepseek-v3-tiny in BF16": (BF16,),
    "deepseek-v3-tiny in FP8": (BF16, FP8),
    "deepseek-v3.2-tiny": (),
    "llama-3.1-8b-tiny": (),
    "llama-3.1-8b-tiny in FP8": (FP8,),
    "gpt-oss-20b-tiny in BF16": (BF16,),
    "qwen3-next-80b-a3b-tiny": (),
}


def spec_of(model: str) -> ModelSpec:
    return load(SPECS / f"{model.split(' ')[0]}.yaml", (*MODELS[model], "parallelism=null"))


def forward(spec: ModelSpec, items: Sequence[Recompute]) -> Any:
    """A model that computes `items` again, after its forward pass, and what came of it."""
    model = build(spec, seed=0)
    recompute(model, items)
    return model, out_of(model)


def out_of(model: Transformer) -> Any:
    windows = torch.randint(0, model.spec.model.vocab_size, (2, 25), generator=torch.Generator().manual_seed(1))
    return model(windows[:, :-1], windows[:, 1:], loss_weights=LossWeights(0.3, 1e-2))


def gradients(model: Transformer) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert [name for name, gradient in wanted.items() if not torch.equal(found[name], gradient)] == []


@pytest.mark.parametrize("model", MODELS)
def test_gradients_counts_and_losses_are_equal_to_the_last_bit(model: str) -> None:
    spec = spec_of(model)
    kept, wanted = forward(spec, ())
    wanted.loss.backward()
    for items in POLICIES:
        again, out = forward(spec, items)
        assert torch.equal(out.loss, wanted.loss)
        out.loss.backward()
        assert_equal(gradients(again), gradients(kept))
        assert out.expert_counts.keys() == wanted.expert_counts.keys()
        for name, counts in wanted.expert_counts.items():
            assert torch.equal(out.expert_counts[name], counts)


@pytest.mark.parametrize("items", [PAPER, ("layer",)])
def test_the_kernels_of_the_forward_pass_compute_again(items: tuple[Recompute, ...]) -> None:
    spec = spec_of("deepseek-v3-tiny")
    with use("reference"):
        kept, wanted = forward(spec, ())
        again, out = forward(spec, items)
    wanted.loss.backward()
    out.loss.backward()
    assert_equal(gradients(again), gradients(kept))


@pytest.mark.parametrize("items", [PAPER, ("layer",)])
def test_a_second_backward_pass_computes_again(items: tuple[Recompute, ...]) -> None:
    model, out = forward(spec_of("deepseek-v3-tiny"), items)
    out.loss.backward(retain_graph=True)
    once = {name: gradient.clone() for name, gradient in gradients(model).items()}
    out.loss.backward()
    assert_equal(gradients(model), {name: 2 * gradient for name, gradient in once.items()})


def test_gradients_of_some_inputs_alone_are_equal_too() -> None:
    # As a pipeline does that computes gradients of activations first and those of weights later.
    found = []
    for policy in ((), *POLICIES):
        model, out = forward(spec_of("deepseek-v3-tiny"), policy)
        first = torch.autograd.grad(out.loss, [model.embed_tokens.weight], retain_graph=True)
        rest = torch.autograd.grad(out.loss, [model.norm.weight, model.layers.get_parameter("1.attention_norm.weight")])
        found.append([*first, *rest])
    for each in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(each, found[0], strict=True))


def test_a_recipe_that_gives_something_else_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of("deepseek-v3-tiny")
    kept, wanted = forward(spec, ())
    wanted.loss.backward()
    honest = Region._computed
    monkeypatch.setattr(Region, "_computed", lambda self: {key: 1.01 * value for key, value in honest(self).items()})
    for items in POLICIES[:3]:
        again, out = forward(spec, items)
        out.loss.backward()
        with pytest.raises(AssertionError):
            assert_equal(gradients(again), gradients(kept))


def test_a_region_that_keeps_another_number_of_tensors_is_refused() -> None:
    times = iter((1, 2))
    scope = Scope()
    x = torch.randn(3, requires_grad=True)

    def compute(x: Tensor) -> Tensor:
        for _ in range(next(times)):
            x = x.sin()
        return x

    y = scope.around(lambda: scope.again(compute)(x).cos())()
    with pytest.raises(AssertionError, match="as many tensors"):
        y.sum().backward()


def remembered() -> list[Region]:
    gc.collect()
    return [each for each in gc.get_objects() if type(each) is Region]


class Operations(TorchDispatchMode):
    """Counts what runs, by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.count = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[func._opname] += 1
        return func(*args, **(kwargs or {}))


PRODUCTS = ("_linear_pointwise", "mm", "bmm", "addmm", "mkldnn_linear_backward_weights", "mv")


def backward_operations(model: str, items: Sequence[Recompute]) -> Counter[str]:
    _, out = forward(spec_of(model), items)
    with Operations() as operations:
        out.loss.backward()
    return operations.count


def test_products_are_done_again_where_latents_lead_to_heads_and_nowhere_else() -> None:
    counts = {items: backward_operations("deepseek-v3-tiny", items) for items in ((), *POLICIES)}
    products = {items: sum(count[name] for name in PRODUCTS) for items, count in counts.items()}
    assert products[("norm",)] == products[("swiglu",)] == products[()]
    blocks = spec_of("deepseek-v3-tiny").model.num_layers + 1
    assert products[("mla_up_projection",)] == products[PAPER] == products[()] + 2 * blocks
    assert products[("layer",)] > products[PAPER]


@pytest.mark.parametrize("model", ["deepseek-v3-tiny", "deepseek-v3.2-tiny"])
def test_experts_and_keys_are_chosen_once(model: str) -> None:
    assert all(backward_operations(model, items)["topk"] == 0 for items in POLICIES)


def test_what_a_norm_gave_is_gone_after_its_layer_and_comes_back() -> None:
    spec = spec_of("llama-3.1-8b-tiny")
    cases: dict[tuple[Recompute, ...], bool] = {(): False, ("norm",): True, ("layer",): True}
    for items, gone in cases.items():
        model = build(spec, seed=0)
        given: list[StorageWeakRef] = []
        for layer in model.layers.children():
            note_output(layer.get_submodule("ffn_norm"), given)
        recompute(model, items)
        loss = out_of(model).loss
        assert len(given) == len(model.layers)
        assert all(reference.expired() is gone for reference in given), items
        loss.backward()


def note_output(module: torch.nn.Module, given: list[StorageWeakRef]) -> None:
    module.register_forward_hook(lambda _, args, out: given.append(StorageWeakRef(out.untyped_storage())))


def test_nothing_stays_of_what_a_backward_pass_brought_back() -> None:
    _, out = forward(spec_of("deepseek-v3-tiny"), PAPER)
    out.loss.backward(retain_graph=True)
    regions = remembered()
    assert regions and all(region._values is None for region in regions)
    del out, regions
    gc.collect()
    assert not remembered()


@pytest.mark.parametrize("items", [("norm",), ("mla_up_projection",), ("swiglu",), PAPER, ("layer",)], ids=str)
def test_what_is_kept_falls_by_what_plan_says(items: tuple[Recompute, ...]) -> None:
    def bytes_kept(recompute: tuple[Recompute, ...]) -> tuple[int, int]:
        case = BENCHMARK["Case"]("tests/specs/deepseek-v3-tiny.yaml", 2, 48, (), recompute)
        return BENCHMARK["measured"](case).activations, BENCHMARK["predicted"](case).activations

    (kept, kept_said), (less, less_said) = bytes_kept(()), bytes_kept(items)
    assert less < kept
    assert kept_said - less_said == pytest.approx(kept - less, rel=0.02)


def test_fp8_layers_keep_nothing_in_fp8_of_inputs_that_come_again() -> None:
    def narrow_bytes(items: Sequence[Recompute]) -> int:
        made: dict[int, tuple[StorageWeakRef, int]] = {}

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                out = func(*args, **(kwargs or {}))
                for tensor in out if isinstance(out, tuple | list) else (out,):
                    if isinstance(tensor, Tensor) and tensor.dtype == torch.float8_e4m3fn:
                        storage = tensor.untyped_storage()
                        made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                return out

        with Watch():
            _, out = forward(spec_of("llama-3.1-8b-tiny in FP8"), items)
        assert out.loss.requires_grad
        return sum(size for reference, size in made.values() if not reference.expired())

    assert narrow_bytes(("norm", "swiglu")) < narrow_bytes(("norm",)) < narrow_bytes(())


@pytest.mark.parametrize("items", [PAPER, ("layer",)])
def test_what_fp8_loses_is_counted_once(items: tuple[Recompute, ...]) -> None:
    counted = []
    for policy in ((), items):
        model = build(spec_of("deepseek-v3-tiny in FP8"), seed=0)
        recompute(model, policy)
        health = Health(torch.device("cpu"))
        with watched(model, health):
            out_of(model).loss.backward()
        counted.append(health.counts)
    assert torch.equal(*counted)


def test_without_gradients_nothing_is_remembered() -> None:
    model = build(spec_of("deepseek-v3-tiny"), seed=0)
    plain = out_of(model).loss
    recompute(model, PAPER)
    with torch.no_grad():
        assert torch.equal(out_of(model).loss, plain)
    assert not remembered()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("items", [PAPER, ("layer",)], ids=str)
def test_compiled_layers_compute_again_what_their_compiler_is_told(items: tuple[Recompute, ...]) -> None:
    spec = load(SPECS / "deepseek-v3-tiny.yaml", ("parallelism=null", "model.mtp=null", "training=null"))

    def step(policy: Sequence[Recompute]) -> tuple[int, dict[str, Tensor]]:
        torch._dynamo.reset()
        model = build(spec, seed=0)
        recompute(model, policy)
        for layer in model.layers.children():
            layer.compile(fullgraph=True, backend="aot_eager_decomp_partition")
        kept: dict[int, tuple[Tensor, int]] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            kept[storage._cdata] = tensor, storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = out_of(model)
        size = sum(size for _, size in kept.values())
        out.loss.backward()
        return size, gradients(model)

    (kept, wanted), (less, found) = step(()), step(items)
    assert less < 0.9 * kept
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
