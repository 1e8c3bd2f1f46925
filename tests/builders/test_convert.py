"""Import and export: bytes come through unchanged, nothing is used twice or left over, nothing is half-written."""

import json
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import modelspec
from modelspec.builders import build, start, tensor_writer, weights
from modelspec.builders.checkpoint import Position, model_tensors, save, save_weights
from modelspec.builders.errors import EnvironmentFailed, Misuse, Refused
from modelspec.builders.generate import find_weights
from modelspec.builders.hf import from_pretrained, save_pretrained
from modelspec.builders.hf.convert import export, open_hub, open_weights
from modelspec.builders.model import Transformer
from modelspec.builders.run import marked
from modelspec.hf_config import HFError
from modelspec.resolve import resolve
from modelspec.schema import ModelSpec
from modelspec.validate import check

Tiny = Callable[..., ModelSpec]
SPECS = Path(__file__).parents[1] / "specs"
FAMILIES = (
    *("deepseek-v2-lite", "deepseek-v3", "deepseek-v3.2", "glm-4.5", "gpt-oss-20b", "llama-3.1-8b", "mixtral-8x7b"),
    *("qwen2.5-7b", "qwen3-30b-a3b", "qwen3-next-80b-a3b"),
)

# The family's class wants a hidden size that the heads divide.
OVERRIDES = {"llama-3.1-8b": ["model.attention.gqa.num_heads=4"]}


def randomized(spec: ModelSpec, dtype: torch.dtype | None = None) -> Transformer:
    """A model none of whose tensors is like another."""
    model = build(spec, dtype=dtype)
    for tensor in model.state_dict().values():
        tensor.normal_(0, 0.3)
    return model


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Same names, dtypes and bits."""
    return one.keys() == other.keys() and all(
        tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]) for name, tensor in one.items()
    )


def hub_tensors(directory: Path) -> dict[str, Tensor]:
    return {name: t for file in sorted(directory.glob("*.safetensors")) for name, t in load_file(file).items()}


@pytest.fixture
def saved(tiny: Tiny, tmp_path: Path) -> Path:
    """A Hugging Face directory."""
    save_pretrained(randomized(tiny()), tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_imported_is_exported_bit_for_bit(name: str, tmp_path: Path) -> None:
    model = randomized(modelspec.load(SPECS / f"{name}-tiny.yaml", overrides=OVERRIDES.get(name, ())), torch.bfloat16)
    save_pretrained(model, tmp_path / "hf")
    found, reading = open_hub(tmp_path / "hf")
    weights.save(found, tmp_path / "ours")
    export(find_weights(tmp_path / "ours")[0], tmp_path / "again")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "hf" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    assert equal(model_tensors(from_pretrained(tmp_path / "ours")), model_tensors(from_pretrained(tmp_path / "hf")))
    assert equal(model_tensors(model), model_tensors(from_pretrained(tmp_path / "ours")))
    spec, diagnostics = check(resolve(tmp_path / "ours" / "spec.yaml"))
    assert spec is not None and not [d for d in diagnostics if d.severity == "error"]
    assert spec.model == reading.spec.model


def test_large_models_are_cut_into_files_that_the_manifest_lists(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_writer, "MAX_SHARD_BYTES", 20_000)
    weights.save(open_hub(saved)[0], tmp_path / "ours")
    files = sorted(path.name for path in (tmp_path / "ours").glob("*.safetensors"))
    manifest = json.loads((tmp_path / "ours" / "manifest.json").read_text())
    assert len(files) > 2 and list(manifest["tensors"]) == files
    assert manifest["files"].keys() == {*files, "spec.yaml"}
    assert equal(model_tensors(from_pretrained(saved)), model_tensors(from_pretrained(tmp_path / "ours")))
    export(open_weights(tmp_path / "ours"), tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors.index.json").exists()
    assert equal(hub_tensors(saved), hub_tensors(tmp_path / "again"))
    assert equal(model_tensors(from_pretrained(saved)), model_tensors(from_pretrained(tmp_path / "again")))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("held", [64 * 2**20, 4 * 100])
def test_a_dtype_converts_all_but_the_selection_biases(
    dtype: torch.dtype, held: int, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "_HELD", held)
    weights.save(open_hub(saved)[0], tmp_path / "ours", dtype)
    export(open_hub(saved)[0], tmp_path / "hf", target=dtype)
    want = {
        name: tensor.to(torch.promote_types(dtype, torch.float32) if name.endswith("selection_bias") else dtype)
        for name, tensor in model_tensors(from_pretrained(saved)).items()
    }
    for folder in ("ours", "hf"):
        assert equal(want, model_tensors(from_pretrained(tmp_path / folder)))
    assert from_pretrained(tmp_path / "ours").compute_dtype == dtype


def test_a_run_is_exported_as_it_stands(tiny: Tiny, tmp_path: Path) -> None:
    model = randomized(tiny())
    save(tmp_path / "run" / "checkpoints", Position(3), model_tensors(model), {}, marked(model.spec), '{"a": 1}')
    export(open_weights(tmp_path / "run"), tmp_path / "hf")
    save_pretrained(model, tmp_path / "want")
    assert equal(hub_tensors(tmp_path / "want"), hub_tensors(tmp_path / "hf"))
    assert (tmp_path / "hf" / "tokenizer.json").read_text() == '{"a": 1}'
    with pytest.raises(Misuse, match="has no checkpoint of step 4; there are: step-3"):
        open_weights(tmp_path / "run", step=4)


def test_multi_token_prediction_may_be_left_out_of_an_export(saved: Path, tmp_path: Path) -> None:
    export(open_weights(saved), tmp_path / "hf", with_mtp=False)
    tensors = hub_tensors(tmp_path / "hf")
    assert not [name for name in tensors if name.startswith("model.layers.3.")]
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["num_nextn_predict_layers"] == 0
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    theirs.set_experts_implementation("eager")
    tokens = torch.randint(0, 61, (1, 9))
    torch.testing.assert_close(from_pretrained(saved)(tokens).logits, theirs(tokens).logits, rtol=1e-5, atol=1e-5)


def test_what_no_family_can_say_is_named_and_nothing_is_written(tiny: Tiny, tmp_path: Path) -> None:
    model = randomized(tiny(mla={"latent_norm_eps": 1e-5}))
    save(tmp_path / "run" / "checkpoints", Position(3), model_tensors(model), {}, marked(model.spec), "{}")
    with pytest.raises(HFError, match="latent_norm_eps"):
        export(open_weights(tmp_path / "run"), tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_parts_of_one_tensor_in_two_dtypes_are_refused_unless_converted(saved: Path, tmp_path: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    name = "model.layers.1.mlp.experts.7.up_proj.weight"
    save_file(tensors | {name: tensors[name].bfloat16()}, saved / "model.safetensors")
    found, _ = open_hub(saved)
    with pytest.raises(Refused, match=r"experts\.7\.up_proj\.weight is BF16 .* one tensor, layers\.1\.ffn\.experts"):
        weights.save(found, tmp_path / "ours")
    weights.save(found, tmp_path / "ours", torch.float32)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "saved"]


@pytest.mark.parametrize("write", [weights.save, export])
def test_what_stands_in_the_way_is_not_touched(write: Any, saved: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(Misuse, match="exists already, and is not an empty folder"):
        write(open_weights(saved), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


@pytest.mark.parametrize("write", [weights.save, export])
def test_an_end_in_the_middle_leaves_nothing(write: Any, saved: Path, tmp_path: Path) -> None:
    def stop(written: int, total: int) -> None:
        if written > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(open_weights(saved), tmp_path / "out", progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


@pytest.mark.parametrize("write", [weights.save, export])
def test_too_little_room_is_found_before_writing(
    write: Any, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(EnvironmentFailed, match="1,000 are free"):
        write(open_weights(saved), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_progress_reaches_the_end(saved: Path, tmp_path: Path) -> None:
    heard: list[tuple[int, int]] = []
    weights.save(open_weights(saved), tmp_path / "out", progress=lambda written, total: heard.append((written, total)))
    assert (
        heard[-1][0]
        == heard[-1][1]
        == sum(t.nbytes for t in load_file(tmp_path / "out" / "model.safetensors").values())
    )


def test_a_weights_folder_that_does_not_fit_its_spec_is_refused(saved: Path, tmp_path: Path, tiny: Tiny) -> None:
    found, _ = open_hub(saved)
    spec = tiny(model={"vocab_size": 62})
    wrong = weights.Weights(found.place, spec, found.parts)
    tensors = [t for t in weights.planned(found) if t.name != "norm.weight"]
    save_weights(tmp_path / "ours", tensors, marked(wrong.spec), {})
    with pytest.raises(Refused, match=r"embed_tokens\.weight is F32\[61, 24\] in the files and \[62, 24\] .*\(3 of"):
        open_weights(tmp_path / "ours")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_initial_weights_are_those_that_a_build_begins_with(dtype: str, tiny: Tiny, tmp_path: Path) -> None:
    spec = tiny(precision={"master_weights": dtype, "compute": dtype})
    start.save_initial(spec, tmp_path / "ours", {"config.json": "{}"}, seed=5)
    assert equal(model_tensors(build(spec, seed=5)), model_tensors(from_pretrained(tmp_path / "ours")))
    assert (tmp_path / "ours" / "config.json").read_text() == "{}"


def test_weights_start_a_model_in_its_own_dtypes(saved: Path, tiny: Tiny) -> None:
    found, spec = open_weights(saved), tiny(precision={"master_weights": "bfloat16", "compute": "bfloat16"})
    model = build(spec)
    assert start.require_fit(found, spec) == ()
    start.start_from(model, found)
    assert equal(model_tensors(model), model_tensors(from_pretrained(saved, dtype=torch.bfloat16)))


def test_multi_token_prediction_may_be_missing_on_either_side_with_a_notice(
    saved: Path, tiny: Tiny, tmp_path: Path
) -> None:
    export(open_weights(saved), tmp_path / "hf", with_mtp=False)
    without = open_weights(tmp_path / "hf")
    (notice,) = start.require_fit(without, tiny())
    assert "tensors of multi-token prediction: these begin with initial values" in notice
    model, fresh = build(tiny()), build(tiny())
    start.start_from(model, without)
    assert torch.equal(model.get_parameter("mtp.0.proj.weight"), fresh.get_parameter("mtp.0.proj.weight"))
    assert torch.equal(model.norm.weight, from_pretrained(saved).norm.weight)
    (notice,) = start.require_fit(open_weights(saved), tiny(model={"mtp": None}))
    assert "are not used: the spec has none" in notice


MISFITS: dict[str, tuple[dict[str, Any], str]] = {
    "vocabulary": (
        {"model": {"vocab_size": 64}},
        r"embed_tokens.weight is \[61, 24\] .* \[64, 24\].*\n.*vocab_size=61",
    ),
    "width": (
        {"moe": {"intermediate_size": 8}},
        r"layers.1.ffn.experts.gate_up_proj is \[10, 14, 24\] there and \[10, 16",
    ),
    "layers": (
        {"model": {"layers": [{"attention": "mla", "ffn": "dense"}]}},
        r"layers.1.* there and absent in the spec",
    ),
    "another form": ({"mla": {"q_lora_rank": None}}, r"q_proj.weight is absent there and \[30, 24\] in the spec"),
}


@pytest.mark.parametrize(("parts", "message"), MISFITS.values(), ids=MISFITS.keys())
def test_weights_that_do_not_fit_name_the_tensor(parts: dict[str, Any], message: str, saved: Path, tiny: Tiny) -> None:
    with pytest.raises(Refused, match=message):
        start.require_fit(open_weights(saved), tiny(**parts))


def test_what_changes_the_function_but_no_shape_is_told(saved: Path, tiny: Tiny) -> None:
    (notice,) = start.require_fit(open_weights(saved), tiny(mla={"rope": {"theta": 50000}}))
    assert "rope.theta was 10000.0" in notice and "is 50000.0 now" in notice


@pytest.mark.parametrize("target", [None, "fp8"])
def test_some_of_the_elements_of_many_parts_are_those_of_the_whole(target: Any, saved: Path, tmp_path: Path) -> None:
    export(open_weights(saved), tmp_path / "hf", target=target)
    found, name = open_weights(tmp_path / "hf"), "layers.1.ffn.experts.gate_up_proj"
    whole = torch.empty(found.spec.tensors()[name].shape)
    weights.fill(whole, found.parts[name])
    size = whole[0].numel()
    assert len(found.parts[name]) == 2 * len(whole)
    for first, count in ((0, 1), (size - 3, 7), (size, size), (size + 5, 2 * size), (whole.numel() - 2, 2), (9, 0)):
        some = torch.full((count,), torch.nan)
        weights.fill(some, found.parts[name], first)
        assert torch.equal(some, whole.flatten()[first : first + count])
