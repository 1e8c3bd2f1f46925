"""build: dtypes, devices and what a device cannot do."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from modelspec.builders import BuildError, LossWeights, build
from modelspec.builders.errors import EnvironmentFailed, Misuse
from modelspec.schema import ModelSpec

Tiny = Callable[..., ModelSpec]

FP8: dict[str, Any] = {
    "format": "e4m3",
    "activation_block": [1, 128],
    "weight_block": [128, 128],
    "scales": "float32",
    "gemms": ["forward", "dgrad", "wgrad"],
}


@pytest.mark.parametrize(
    ("dtype", "buffers", "logits"),
    [
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.float32, torch.float32),
        (torch.float64, torch.float64, torch.float64),
    ],
    ids=["bfloat16", "float32", "float64"],
)
def test_an_explicit_dtype_wins_over_precision(
    dtype: torch.dtype, buffers: torch.dtype, logits: torch.dtype, tiny: Tiny
) -> None:
    precision = {"compute": "bfloat16", "master_weights": "float32", "fp8": FP8}
    model = build(tiny(precision=precision), dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert {b.dtype for b in model.buffers()} == {buffers}
    tokens = torch.randint(0, 61, (2, 7))
    assert model(tokens).logits.dtype == logits
    loss = model(tokens, targets=tokens, loss_weights=LossWeights(mtp=0.3, balance=0.1)).loss
    assert loss.isfinite()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("master", ["bfloat16", "float32", "float64"])
def test_parameters_are_kept_in_master_weights(master: str, tiny: Tiny) -> None:
    model = build(tiny(precision={"master_weights": master, "compute": "float32"}))
    assert {str(p.dtype) for p in model.parameters()} == {f"torch.{master}"}
    tokens = torch.randint(0, 61, (1, 5))
    assert model(tokens).logits.dtype == torch.float32


def test_fp8_where_the_device_has_none_is_an_error_that_says_what_to_set(tiny: Tiny) -> None:
    with pytest.raises(BuildError, match=r"precision\.fp8=null") as caught:
        build(tiny(precision={"fp8": FP8}))
    assert caught.value.exit_code == 1


@pytest.mark.parametrize("dtype", [torch.int8, torch.float16, torch.complex64, "bfloat16"], ids=str)
def test_a_dtype_that_nothing_is_built_in_is_refused_with_those_that_are(dtype: Any, tiny: Tiny) -> None:
    with pytest.raises(
        BuildError, match=r"is none that models are built in: torch\.float64, torch\.float32, torch\.bf"
    ):
        build(tiny(), dtype=dtype, device="meta")


@pytest.mark.parametrize("device", ["gpu0", "", None, 1.5], ids=repr)
def test_what_is_no_device_is_named(device: Any, tiny: Tiny) -> None:
    with pytest.raises(Misuse, match=f"{device!r} is no device; cpu, cuda and cuda:1 are"):
        build(tiny(), device=device)


def test_a_device_that_is_not_there_is_named(tiny: Tiny) -> None:
    with pytest.raises(EnvironmentFailed, match="device cuda:99: "):
        build(tiny(), device="cuda:99")


def test_fp8_builds_on_meta(tiny: Tiny) -> None:
    model = build(tiny(precision={"compute": "bfloat16", "fp8": FP8}), device="meta")
    assert all(p.is_meta for p in model.parameters())


def test_model_runs_on_meta_for_its_shapes(tiny: Tiny) -> None:
    model = build(tiny(), device="meta")
    tokens = torch.zeros(2, 9, dtype=torch.long, device="meta")
    assert model(tokens).logits.shape == (2, 9, 61)


# torch's own tracer makes an instance of autograd.Function, and warns of itself.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_model_compiles_in_one_graph_with_the_same_gradients(tiny: Tiny) -> None:
    layers = [{"attention": "mla", "ffn": "dense"}, {"attention": "mla", "ffn": "moe"}]
    model = build(tiny(model={"layers": layers, "mtp": None}))
    tokens = torch.randint(0, 61, (2, 8))

    def gradients(run: Any) -> dict[str, torch.Tensor | None]:
        model.zero_grad()
        run(tokens, targets=tokens).loss.backward()
        return {name: p.grad for name, p in model.named_parameters()}

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradients(compiled), gradients(model))


def test_loss_weights_default_to_the_schedules_at_the_first_step(tiny: Tiny) -> None:
    training = {
        "optimizer": {"type": "adamw", "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1},
        "losses": {"mtp": [{"until_tokens": 100, "value": 0.3}, {"value": 0.1}], "balance": {"sequence": 0.5}},
        "stages": [{"name": "s", "steps": 2, "sequence_length": 8, "batch_size": 1, "learning_rate": 1e-3}],
    }
    tokens = torch.randint(0, 61, (1, 8))
    trained = build(tiny(training=training))
    default = trained(tokens, targets=tokens).loss
    torch.testing.assert_close(
        default, trained(tokens, targets=tokens, loss_weights=LossWeights(mtp=0.3, balance=0.5)).loss
    )
    plain = build(tiny())
    torch.testing.assert_close(plain(tokens, targets=tokens).loss, plain(tokens, targets=tokens).losses.lm)


def test_parallelism_recompute_and_compile_are_ignored(tiny: Tiny) -> None:
    parallelism = {"world_size": 8, "tensor": 2, "recompute": ["layer"], "compile": "layer"}
    tokens = torch.randint(0, 61, (1, 8))
    torch.testing.assert_close(build(tiny(parallelism=parallelism))(tokens).logits, build(tiny())(tokens).logits)
