"""`precision.fp8` is all it takes: which layers compute in FP8, when weights are quantised, what is refused."""

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from modelspec import schema
from modelspec.builders import build
from modelspec.builders.build import BuildError
from modelspec.builders.checkpoint import model_tensors
from modelspec.builders.errors import Refused
from modelspec.builders.fp8 import FP8Experts, FP8Linear, FP8SwiGLU
from modelspec.builders.generate import find_weights
from modelspec.builders.layers import Linear
from modelspec.builders.learner import Learner
from modelspec.builders.model import LossWeights, Transformer
from modelspec.builders.run import opened
from modelspec.builders.trainer import train
from modelspec.builders.weights import load as load_weights
from modelspec.kernels import fp8_linear
from modelspec.kernels.quantize_weight import quantize_weight
from modelspec.schema import ModelSpec
from modelspec.timeline import timeline
from modelspec.validate import load

Tiny = Callable[..., ModelSpec]
SPECS = Path(__file__).parents[2] / "tests" / "specs"
FP8: dict[str, Any] = {
    "format": "e4m3", "activation_block": [1, 128], "weight_block": [128, 128], "scales": "float32",
    "gemms": ["forward", "dgrad", "wgrad"], "emulate": True,
}  # fmt: skip
TEXT = "{format: e4m3, activation_block: [1, 128], weight_block: [128, 128], scales: float32, " \
    "gemms: [forward, dgrad, wgrad], emulate: true}"  # fmt: skip
OPTIONS = {"attention_output": "e5m6", "swiglu_input": "e4m3", "dispatch": True}
TRAINING: dict[str, Any] = {
    "optimizer": {"type": "adamw", "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1},
    "gradient_clip": 1.0,
    "losses": {"mtp": 0.3, "balance": {"sequence": 1e-4}},
    "router_bias_update_speed": 0.01,
    "stages": [{"name": "main", "steps": 4, "sequence_length": 16, "batch_size": 4, "learning_rate": 1e-2}],
    "checkpoint": {"every_steps": 2, "keep_last": 2},
}


def tokens(batch: int = 4, length: int = 17) -> Tensor:
    return torch.randint(0, 61, (batch, length))


def learner_of(spec: ModelSpec) -> Learner:
    assert spec.training is not None
    return Learner(spec, spec.training, torch.device("cpu"))


def step(learner: Learner, batch: Tensor | None = None) -> Any:
    return learner.step(next(timeline(learner.training)), tokens() if batch is None else batch)


def weights_in_fp8(model: torch.nn.Module) -> set[str]:
    """Names of parameters whose products run in FP8."""
    found = set()
    for name, module in model.named_modules():
        if isinstance(module, FP8Linear):
            found.add(f"{name}.weight")
        elif isinstance(module, FP8Experts):
            found |= {f"{name}.gate_up_proj", f"{name}.down_proj"}
    return found


@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-v3.2", "gpt-oss-20b", "qwen3-next-80b-a3b", "llama-3.1-8b"])
def test_the_layers_in_fp8_are_those_that_the_schema_names(name: str) -> None:
    spec = load(f"modelspec:{name}", [f"precision.fp8={TEXT}"])
    model = build(spec, device="meta")
    inside = weights_in_fp8(model)
    assert inside == {each for each in spec.tensors() if schema.in_fp8(each)}
    outside = {each for each in spec.tensors() if each not in inside}
    assert {"embed_tokens.weight", "lm_head.weight", "norm.weight"} <= outside
    assert ("mtp.0.proj.weight" in inside) == (spec.model.mtp is not None)
    for part in (".router.", ".indexer.", ".shared_gate.", "norm"):
        assert not any(part in each for each in inside)
    assert model.state_dict().keys() == spec.tensors().keys()


def test_what_stays_out_of_fp8_is_what_it_was(tiny: Tiny) -> None:
    narrow, wide = (build(tiny(precision={"compute": "bfloat16", "fp8": each})) for each in (FP8, None))
    assert all(torch.equal(a, b) for a, b in zip(narrow.parameters(), wide.parameters(), strict=True))
    of_names = dict(wide.named_modules())
    for name, module in narrow.named_modules():
        expected = {Linear: FP8Linear, type(of_names[name]): type(of_names[name])}
        if not isinstance(module, FP8Linear | FP8Experts):
            assert type(module) is expected[type(of_names[name])], name
    batch = tokens(2, 9)
    difference = (narrow(batch).logits - wide(batch).logits).abs().max()
    assert 0 < difference < 1


def test_an_explicit_dtype_turns_fp8_off(tiny: Tiny) -> None:
    assert not weights_in_fp8(build(tiny(precision={"fp8": FP8}), dtype=torch.bfloat16))


def quantised(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one whenever a weight is quantised."""
    calls: list[int] = []
    original = quantize_weight

    def counted(weight: Tensor, ue8m0: bool) -> tuple[Tensor, ...]:
        calls.append(id(weight))
        return original(weight, ue8m0)

    monkeypatch.setattr("modelspec.builders.fp8.quantize_weight", counted)
    return calls


def test_a_weight_is_quantised_once_per_optimizer_step(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    learner = learner_of(tiny(precision={"fp8": FP8}, parallelism={"microbatch_size": 2}, training=TRAINING))
    calls, number = quantised(monkeypatch), len(weights_in_fp8(learner.model))
    for steps in range(1, 4):
        step(learner)
        assert len(calls) == steps * number
    # Evaluation reads what the last step made, once, and training goes on with that.
    learner.evaluate(tokens().numpy(), 2, lambda: None)
    learner.evaluate(tokens().numpy(), 2, lambda: None)
    assert len(calls) == 4 * number
    step(learner)
    assert len(calls) == 4 * number


@pytest.mark.parametrize("fused", [False, True], ids=["counted", "fused, which counts nothing"])
def test_the_fp8_weight_follows_any_optimizer(tiny: Tiny, fused: bool) -> None:
    model = build(tiny(precision={"fp8": FP8}))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
    batch = tokens()
    for _ in range(2):
        loss = model(batch, targets=batch).loss
        assert loss is not None
        loss.backward()
        optimizer.step()
        assert torch.equal(model(batch).logits, deepcopy(model)(batch).logits)
        optimizer.zero_grad()
    fresh = build(model.spec)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(model(batch).logits, fresh(batch).logits)


def test_the_fp8_weight_follows_changes_in_place_and_loading(tiny: Tiny) -> None:
    model, other = (build(tiny(precision={"fp8": FP8}), seed=seed) for seed in (0, 1))
    batch = tokens()
    before = model(batch).logits
    with torch.inference_mode():
        assert torch.equal(model(batch).logits, before)
    with torch.no_grad():
        model.get_parameter("layers.0.attention.o_proj.weight").mul_(2.0)
    assert not torch.equal(model(batch).logits, before)
    model.load_state_dict(other.state_dict())
    assert torch.equal(model(batch).logits, other(batch).logits)


def test_a_first_pass_for_inference_leaves_a_model_that_trains(tiny: Tiny) -> None:
    model = build(tiny(precision={"compute": "bfloat16", "fp8": FP8 | OPTIONS}))
    with torch.inference_mode():
        model(tokens())
    loss = model(tokens(), targets=tokens()).loss
    assert loss is not None
    loss.backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("options", [{}, OPTIONS, {"scales": "ue8m0"}, {"gemms": ["forward"]}], ids=str)
def test_gradients_in_fp8_are_near_those_of_fp32(tiny: Tiny, compute: str, options: dict[str, Any]) -> None:
    one = {"layers": [{"attention": "mla", "ffn": "moe"}], "mtp": None, "init": {"std": 0.05}}
    precisions: tuple[dict[str, Any], ...] = ({"compute": compute, "fp8": FP8 | options}, {})
    models = [build(tiny(model=one, precision=each)) for each in precisions]
    batch = tokens(8, 33)
    for model in models:
        loss = model(batch[:, :-1], targets=batch[:, 1:]).loss
        assert loss is not None
        loss.backward()
    for (name, ours), theirs in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None and ours.grad.dtype == torch.float32
        # Some tokens choose another expert.
        assert float((ours.grad - theirs.grad).norm() / theirs.grad.norm()) < 0.3, name


def test_an_input_of_several_layers_is_quantised_once(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(tiny(model={"layers": [{"attention": "mla", "ffn": "dense"}], "mtp": None}, precision={"fp8": FP8}))
    quantised = Mock(wraps=fp8_linear.sides)
    monkeypatch.setattr(fp8_linear, "sides", quantised)
    model(tokens())
    # q_a and kv_a share one, gate and up another; q_b, kv_b, o and down have their own.
    assert quantised.call_count == 6


def test_options_of_the_paper_reach_their_layers(tiny: Tiny) -> None:
    model = build(tiny(precision={"fp8": FP8 | OPTIONS}), device="meta")
    kept = {name.rpartition(".")[2] for name, each in model.named_modules() if getattr(each, "keep_e5m6", False)}
    assert kept == {"o_proj"}
    assert sum(isinstance(module, FP8SwiGLU) for module in model.modules()) == 4
    assert all(each.fp8.dispatch for each in model.modules() if isinstance(each, FP8Experts))
    plain = build(tiny(precision={"fp8": FP8}), device="meta")
    assert not any(isinstance(module, FP8SwiGLU) or getattr(module, "keep_e5m6", False) for module in plain.modules())


@pytest.mark.parametrize("name", ["gpt-oss-20b", "qwen3-next-80b-a3b", "deepseek-v3.2"])
def test_every_kind_of_layer_learns_in_fp8(name: str) -> None:
    """Biases, clamps, recurrences and indexers too."""
    overrides = [f"precision.fp8={TEXT}", "precision.compute=bfloat16", "precision.master_weights=float32"]
    model = build(load(SPECS / f"{name}-tiny.yaml", overrides))
    assert weights_in_fp8(model)
    batch = torch.randint(0, model.spec.model.vocab_size, (2, 25))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(2):
        loss = model(batch[:, :-1], targets=batch[:, 1:]).loss
        assert loss is not None
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    assert losses[1] < losses[0]


def test_gradients_that_are_not_finite_skip_the_step(tiny: Tiny) -> None:
    learner = learner_of(tiny(precision={"fp8": FP8}, training=TRAINING))
    with torch.no_grad():
        learner.model.get_parameter("layers.1.ffn.experts.down_proj")[:, 3, 2] = float("inf")
    before = {name: tensor.clone() for name, tensor in model_tensors(learner.model).items()}
    done = step(learner)
    assert done.skipped
    assert all(torch.equal(before[name], tensor) for name, tensor in model_tensors(learner.model).items())


def test_what_fp8_loses_stands_in_the_metrics(tiny: Tiny, tmp_path: Path) -> None:
    narrow, wide = (step(learner_of(tiny(precision={"fp8": each}, training=TRAINING))) for each in (FP8, None))
    assert wide.fp8 is None
    assert narrow.fp8.fp8_activation_saturation > 1 / 128
    assert narrow.fp8.fp8_gradient_saturation > 1 / 128
    assert 0 < narrow.fp8.fp8_weight_saturation < 0.05
    assert 0 <= narrow.fp8.fp8_gradient_underflow < 0.01
    with opened(tmp_path / "run", resume=False, overwrite=False) as run:
        run.log(narrow)
        run.log(wide)
        rows = run.rows()
    assert rows[0]["fp8_gradient_saturation"] == narrow.fp8.fp8_gradient_saturation
    assert not any(key.startswith("fp8") for key in rows[1]) and len(rows) == 2


def test_weights_are_counted_in_every_step_whoever_quantised_them(tiny: Tiny) -> None:
    learner = learner_of(tiny(precision={"fp8": FP8}, training=TRAINING))
    for _ in range(2):
        assert step(learner).fp8.fp8_weight_saturation > 0
        # What the next step starts with is quantised here.
        learner.evaluate(tokens().numpy(), 4, lambda: None)


def test_counting_changes_no_number(tiny: Tiny) -> None:
    spec = tiny(precision={"fp8": FP8 | OPTIONS}, training=TRAINING)
    batch, learner, model = tokens(), learner_of(spec), build(spec)
    done = step(learner, batch)
    loss = model(batch[:, :-1], batch[:, 1:], loss_weights=LossWeights(0.3, 1e-4)).loss
    assert loss is not None and done.loss == pytest.approx(float(loss.detach()), rel=1e-6)


@pytest.fixture
def run_spec(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tiny:
    """A spec with text to train on."""
    monkeypatch.setenv("MODELSPEC_CACHE", str(tmp_path / "cache"))
    for index in range(40):
        (tmp_path / f"{index}.txt").write_text(f"text number {index} of the corpus, and some more words\n" * 20)
    data = {
        "sources": [{"type": "text", "files": str(tmp_path / "*.txt")}],
        "tokenizer": {"type": "bpe_trained", "vocab_size": 280},
    }

    def make(**sections: Any) -> ModelSpec:
        small = {"vocab_size": 280, "layers": [{"attention": "mla", "ffn": "moe"}], "mtp": None}
        return tiny(model=small, data=data, training=TRAINING | {"losses": {"balance": {"sequence": 1e-4}}}, **sections)

    return make


def test_a_run_in_fp8_resumes_bit_for_bit_and_goes_on_without_it(run_spec: Tiny, tmp_path: Path) -> None:
    narrow, wide = run_spec(precision={"fp8": FP8 | OPTIONS}), run_spec()
    train(narrow, tmp_path / "whole")
    train(narrow, tmp_path / "parts", steps=2)
    train(narrow, tmp_path / "parts", resume=True)

    def bits(name: str) -> dict[str, bytes]:
        folder = tmp_path / name / "checkpoints" / "step-4"
        return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}

    assert bits("parts") == bits("whole")
    assert train(narrow, tmp_path / "mixed", steps=2).step == 2
    with pytest.raises(Refused, match=r"precision\.fp8"):
        train(wide, tmp_path / "mixed", resume=True)
    assert train(wide, tmp_path / "mixed", resume=True, allow_changed=True).step == 4
    assert bits("mixed").keys() == bits("whole").keys() and bits("mixed") != bits("whole")


def test_a_run_in_fp8_is_read_back_in_fp8_or_in_a_dtype(run_spec: Tiny, tmp_path: Path) -> None:
    train(run_spec(precision={"fp8": FP8}), tmp_path / "run", steps=2)
    weights, _ = find_weights(tmp_path / "run")
    narrow, wide = load_weights(weights), load_weights(weights, dtype=torch.float32)
    assert weights_in_fp8(narrow) and not weights_in_fp8(wide)
    batch = torch.randint(0, 280, (1, 12))
    difference = (narrow(batch).logits - wide(batch).logits).abs().max()
    assert 0 < difference < 2
    real = weights.spec.precision.model_copy(update={"fp8": schema.FP8.model_validate(FP8 | {"emulate": False})})
    asks = weights.spec.model_copy(update={"precision": real})
    with pytest.raises(Refused, match=r"precision\.fp8: cpu has no FP8 .*--dtype bfloat16"):
        load_weights(replace(weights, spec=asks))


@pytest.mark.parametrize(
    ("precision", "path", "help"),
    [
        (
            {"fp8": FP8 | {"emulate": False}},
            r"precision\.fp8: cpu has no FP8",
            r"precision\.fp8=null, or .*emulate=true",
        ),
        ({"fp8": FP8 | {"weight_block": [64, 64]}}, r"precision\.fp8\.weight_block: .* 64 x 64", r"\[128, 128\]"),
        ({"fp8": FP8 | {"activation_block": [1, 32]}}, r"precision\.fp8\.activation_block: .* 1 x 32", r"\[1, 128\]"),
        ({"fp8": FP8, "compute": "float64"}, r"precision\.compute: FP8 products give BF16 or FP32", "float32"),
    ],
    ids=["device", "weight_block", "activation_block", "float64"],
)
def test_what_cannot_be_computed_is_refused_before_anything_is_written(
    precision: dict[str, Any], path: str, help: str, run_spec: Tiny, tmp_path: Path
) -> None:
    spec = run_spec(precision=precision)
    with pytest.raises(BuildError, match=rf"(?s){path}.*{help}") as refused:
        build(spec)
    assert "1 o_proj" in str(refused.value) and "1 experts.down_proj" in str(refused.value)
    with pytest.raises((BuildError, Refused), match=rf"(?s){path}.*{help}"):
        train(spec, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_fp8_that_no_device_here_has_builds_on_meta(tiny: Tiny) -> None:
    assert weights_in_fp8(build(tiny(precision={"fp8": FP8 | {"emulate": False}}), device="meta"))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
def test_compiled_layers_follow_their_weights(tiny: Tiny) -> None:
    layers = [{"attention": "mla", "ffn": "dense"}, {"attention": "mla", "ffn": "moe"}]
    spec = tiny(model={"layers": layers, "mtp": None}, precision={"fp8": FP8 | OPTIONS})
    compiled, eager = build(spec), build(spec)
    for layer in compiled.layers.children():
        layer.compile(fullgraph=True, backend="aot_eager")
    batch = tokens(2, 12)

    def step_of(model: Transformer) -> Tensor:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
        loss = model(batch[:, :-1], targets=batch[:, 1:]).loss
        assert loss is not None
        loss.backward()
        optimizer.step()
        return loss.detach()

    for _ in range(3):
        torch.testing.assert_close(step_of(compiled), step_of(eager), rtol=1e-4, atol=1e-5)


def test_the_shipped_laptop_model_is_nano_with_v3s_recipe() -> None:
    nano, narrow, v3 = (load(f"modelspec:{name}") for name in
                        ("deepseek-v3-nano", "deepseek-v3-nano-fp8", "deepseek-v3"))  # fmt: skip
    assert narrow.precision.fp8 is not None and v3.precision.fp8 is not None
    assert narrow.precision.fp8.emulate
    assert narrow.precision.fp8.model_copy(update={"emulate": False}) == v3.precision.fp8
    without = {"name", "summary", "precision"}
    assert json.loads(narrow.model_dump_json(exclude=without)) == json.loads(nano.model_dump_json(exclude=without))


def test_a_weight_that_takes_the_place_of_another_is_quantised_itself(tiny: Tiny) -> None:
    """Tensors that are gone leave their id, and often their memory, to new ones."""
    model = build(tiny(precision={"fp8": FP8}))
    linear = next(module for module in model.modules() if isinstance(module, FP8Linear))
    base, x = linear.weight.detach().clone(), torch.randn(8, linear.weight.shape[1])
    wanted = linear(x).detach()
    for scale in (2.0, 4.0, 0.5) * 8:
        found = torch.func.functional_call(linear, {"weight": base * scale}, (x,))
        torch.testing.assert_close(found, wanted * scale)
    linear.weight.data = base * 2
    torch.testing.assert_close(linear(x), wanted * 2)
