"""Block-scaled FP8 checkpoints: kept byte for byte, multiplied out exactly, laid out as published."""

import json
from collections.abc import Callable
from math import ceil, prod
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import modelspec
from modelspec.builders import build, start, weights
from modelspec.builders.checkpoint import model_tensors
from modelspec.builders.errors import Misuse, Refused
from modelspec.builders.hf import from_pretrained, save_pretrained
from modelspec.builders.hf.convert import export, hub_table, open_hub, open_weights
from modelspec.builders.tensor_files import FILE_DTYPES, TORCH_DTYPES, read_directory
from modelspec.hf_config import HFError
from modelspec.kernels.block_scale import E4M3, dequantize, quantize
from modelspec.schema import ModelSpec

Tiny = Callable[..., ModelSpec]
QUANTIZATION = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}


def slowly(weight: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """The values, element by element, in double precision and rounded to FP32."""
    result = torch.empty(weight.shape)
    for i in range(weight.shape[0]):
        for j in range(weight.shape[1]):
            result[i, j] = float(weight[i, j]) * float(scales[i // block[0], j // block[1]])
    return result


def by_index(weight: Tensor, scales: Tensor) -> Tensor:
    """The same for blocks of 128 x 128, every element looking its scale up."""
    rows, columns = (torch.arange(size) // 128 for size in weight.shape)
    return (weight.double() * scales.double()[rows[:, None], columns]).float()


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(1, 4), st.integers(0, 2**32))
def test_dequantize_is_a_product_per_block_also_at_ragged_edges(
    rows: int, columns: int, block_rows: int, block_columns: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(rows, columns, generator=generator) * 100).to(E4M3)
    scales = torch.rand(ceil(rows / block_rows), ceil(columns / block_columns), generator=generator) + 0.1
    block = (block_rows, block_columns)
    assert torch.equal(dequantize(weight, scales, block, torch.float32), slowly(weight, scales, block))
    rounded = dequantize(weight, scales, block, torch.bfloat16)
    assert torch.equal(rounded, slowly(weight, scales, block).bfloat16())


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32), st.floats(1e-6, 1e30))
def test_quantize_scales_each_block_to_the_largest_number_and_rounds_once(
    rows: int, columns: int, seed: int, size: float
) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * size
    block = (4, 3)
    q, scales = quantize(weight, block)
    assert (q.dtype, q.shape, scales.shape) == (E4M3, weight.shape, (ceil(rows / 4), ceil(columns / 3)))
    back = slowly(q, scales, block)
    for i in range(0, rows, 4):
        for j in range(0, columns, 3):
            mine, theirs = weight[i : i + 4, j : j + 3], back[i : i + 4, j : j + 3]
            amax = float(mine.abs().max())
            assert float(scales[i // 4, j // 3]) == pytest.approx(amax / 448, rel=1e-6)
            assert float(theirs.abs().max()) == pytest.approx(amax, rel=1e-6)
            # Half a unit in the last of 3 bits, or half the least subnormal.
            assert (
                (mine - theirs).abs() <= torch.maximum(mine.abs() / 16, torch.tensor(amax / 448 / 1024)) * 1.001
            ).all()


def test_a_block_of_zeros_comes_back_as_zeros() -> None:
    q, scales = quantize(torch.zeros(3, 5), (2, 2))
    assert torch.equal(dequantize(q, scales, (2, 2), torch.float32), torch.zeros(3, 5))


def test_the_table_of_the_published_v3_checkpoint_is_met_to_the_byte() -> None:
    table = hub_table(modelspec.load("specs/deepseek-v3.yaml").model, block=(128, 128))
    assert len(table) == 91_991
    assert sum(prod(header.shape) for header in table.values()) == 684_531_386_000
    assert sum(prod(h.shape) * TORCH_DTYPES[h.dtype].itemsize for h in table.values()) == 688_574_839_360
    assert table["model.layers.5.self_attn.kv_a_proj_with_mqa.weight_scale_inv"].shape == (5, 56)
    assert table["model.layers.5.mlp.gate.e_score_correction_bias"].dtype == "F32"
    for name in ("mlp.gate.weight", "eh_proj.weight", "embed_tokens.weight", "shared_head.head.weight", "enorm.weight"):
        assert table[f"model.layers.61.{name}"].dtype == "BF16"
    scaled = {name.removesuffix("_scale_inv") for name in table if name.endswith("_scale_inv")}
    assert scaled == {name for name, header in table.items() if header.dtype == "F8_E4M3"}
    assert {
        name.split(".", 3)[3] for name in scaled if name.startswith("model.layers.61.") and "experts" not in name
    } == {f"self_attn.{p}.weight" for p in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")}


@pytest.fixture(scope="module")
def spec(tiny: Tiny) -> ModelSpec:
    """Sizes that leave blocks part empty, in gate and up rows each too."""
    return tiny(
        model={"hidden_size": 136},
        mla={"kv_lora_rank": 132, "q_lora_rank": 140, "num_heads": 13},
        moe={
            "intermediate_size": 130,
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "router": {"selection": {"groups": None}},
        },
    )


@pytest.fixture
def published(spec: ModelSpec, tmp_path: Path) -> Path:
    """A checkpoint as it is published: two files, each scale in another one than its weight."""
    model = build(spec, dtype=torch.bfloat16)
    save_pretrained(model, tmp_path / "published")
    folder = tmp_path / "published"
    files: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    headers = hub_table(spec.model, block=(128, 128))
    for number, (name, header) in enumerate(headers.items()):
        if name.endswith("_scale_inv"):
            continue
        tensor = torch.randn(header.shape)
        files[number % 2][name] = (tensor * 50).to(TORCH_DTYPES[header.dtype])
        if header.dtype == "F8_E4M3":
            files[1 - number % 2][f"{name}_scale_inv"] = torch.rand(headers[f"{name}_scale_inv"].shape) / 500
    for copy, name in (("embed_tokens", "model.embed_tokens"), ("shared_head.head", "lm_head")):
        for file in files:
            file.pop(f"model.layers.3.{copy}.weight", None)
        files[0][f"model.layers.3.{copy}.weight"] = next(
            f[f"{name}.weight"] for f in files if f"{name}.weight" in f
        ).clone()
    where: dict[str, str] = {}
    (folder / "model.safetensors").unlink()
    for number, tensors in enumerate(files):
        save_file(tensors, folder / f"model-{number}.safetensors", metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, f"model-{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": QUANTIZATION}))
    return folder


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Same names, dtypes and bits."""
    return one.keys() == other.keys() and all(
        t.dtype == other[n].dtype and torch.equal(t.view(torch.uint8), other[n].view(torch.uint8))
        for n, t in one.items()
    )


def test_fp8_is_kept_with_its_scales_and_written_again_as_the_same_bytes(published: Path, tmp_path: Path) -> None:
    weights.save(open_hub(published)[0], tmp_path / "ours")
    export(open_weights(tmp_path / "ours"), tmp_path / "again")
    assert same(tensors_of(published), tensors_of(tmp_path / "again"))
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["quantization_config"] == QUANTIZATION
    assert config == json.loads((published / "config.json").read_text())
    export(open_weights(published), tmp_path / "straight")
    assert same(tensors_of(published), tensors_of(tmp_path / "straight"))


def test_experts_are_stacked_with_their_scales(published: Path, tmp_path: Path) -> None:
    weights.save(open_hub(published)[0], tmp_path / "ours")
    ours, theirs = tensors_of(tmp_path / "ours"), tensors_of(published)
    for suffix in ("", "_scale_inv"):
        for expert in range(5):
            names = [f"model.layers.1.mlp.experts.{expert}.{p}_proj.weight{suffix}" for p in ("gate", "up")]
            wanted = torch.cat([theirs[name].view(torch.uint8) for name in names])
            assert torch.equal(ours[f"layers.1.ffn.experts.gate_up_proj{suffix}"][expert].view(torch.uint8), wanted)
    assert ours["layers.1.ffn.experts.gate_up_proj_scale_inv"].shape == (5, 4, 2)


@pytest.mark.parametrize("held", [64 * 2**20, 4 * 128 * 136])
def test_a_dtype_multiplies_out_exactly(
    held: int, published: Path, spec: ModelSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "_HELD", held)
    theirs = tensors_of(published)
    plain = {
        name: by_index(tensor, theirs[f"{name}_scale_inv"]).bfloat16() if tensor.dtype == E4M3 else tensor
        for name, tensor in theirs.items()
        if not name.endswith("_scale_inv")
    }
    weights.save(open_hub(published)[0], tmp_path / "kept")
    weights.save(open_hub(published)[0], tmp_path / "ours", torch.bfloat16)
    export(open_weights(published), tmp_path / "straight", target=torch.bfloat16)
    export(open_weights(tmp_path / "kept"), tmp_path / "late", target=torch.bfloat16)
    for name in ("straight", "late"):
        assert same(plain, tensors_of(tmp_path / name))
        assert "quantization_config" not in json.loads((tmp_path / name / "config.json").read_text())
    model = from_pretrained(tmp_path / "straight")
    for folder in (tmp_path / "ours", published, tmp_path / "kept"):
        assert same(model_tensors(model), model_tensors(from_pretrained(folder, dtype=torch.bfloat16)))
    assert from_pretrained(tmp_path / "ours").spec.precision.fp8 is None


def test_fp8_without_a_dtype_names_the_remedy(published: Path, tmp_path: Path) -> None:
    weights.save(open_hub(published)[0], tmp_path / "ours")
    for folder in (published, tmp_path / "ours"):
        with pytest.raises(Refused, match=r"FP8; pass a dtype to convert them to, like dtype=torch\.bfloat16"):
            from_pretrained(folder)


def test_training_starts_from_fp8_in_its_own_dtype(published: Path, spec: ModelSpec) -> None:
    found, model = open_weights(published), build(spec)
    assert start.require_fit(found, spec) == ()
    start.start_from(model, found)
    assert same(model_tensors(model), model_tensors(from_pretrained(published, dtype=torch.float32)))


def test_an_export_to_fp8_has_the_published_layout_and_the_best_scales(
    spec: ModelSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "_HELD", 4 * 128 * 136)
    save_pretrained(build(spec, dtype=torch.bfloat16), tmp_path / "hf")
    export(open_weights(tmp_path / "hf"), tmp_path / "fp8", target="fp8")
    found = read_directory(tmp_path / "fp8")
    headers = hub_table(spec.model, block=(128, 128))
    assert {name: (s.dtype, s.shape) for name, s in found.items()} == {
        name: (header.dtype, header.shape) for name, header in headers.items()
    }
    before, after = tensors_of(tmp_path / "hf"), tensors_of(tmp_path / "fp8")
    for name, tensor in before.items():
        if after[name].dtype == E4M3:
            q, scales = quantize(tensor, (128, 128))
            assert same({"q": q, "scales": scales}, {"q": after[name], "scales": after[f"{name}_scale_inv"]})
    assert json.loads((tmp_path / "fp8" / "config.json").read_text())["quantization_config"] == QUANTIZATION
    open_hub(tmp_path / "fp8")
    export(open_weights(tmp_path / "fp8"), tmp_path / "again", target="fp8")
    assert same(after, tensors_of(tmp_path / "again"))


def change(folder: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    """Puts all tensors into one file, changed."""
    tensors = tensors_of(folder)
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


WEIGHT = "model.layers.1.self_attn.o_proj.weight"
SPOILED: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "scale missing": (lambda t: t.pop(f"{WEIGHT}_scale_inv"), rf"{WEIGHT} is F8_E4M3, but .*_scale_inv is missing"),
    "scale misshaped": (
        lambda t: t.update({f"{WEIGHT}_scale_inv": torch.ones(1, 1)}),
        rf"{WEIGHT}_scale_inv is F32\[1, 1\]; one F32 for each block of \[136, 65\] is F32\[2, 1\]",
    ),
    "scale in BF16": (
        lambda t: t.update({f"{WEIGHT}_scale_inv": torch.ones(2, 1).bfloat16()}),
        rf"{WEIGHT}_scale_inv is BF16",
    ),
    "scale of a plain weight": (
        lambda t: t.update({WEIGHT: t[WEIGHT].bfloat16()}),
        rf"{WEIGHT} is BF16\[136, 65\] and has scales; only F8_E4M3 matrices have them",
    ),
    "scale of nothing": (
        lambda t: t.update({"x.weight_scale_inv": torch.ones(1)}),
        "x.weight_scale_inv is not part of",
    ),
    "weight misshaped": (lambda t: t.update({WEIGHT: t[WEIGHT][1:].clone()}), r"o_proj.weight has shape \[135, 65\]"),
}


@pytest.mark.parametrize(("edit", "message"), SPOILED.values(), ids=SPOILED.keys())
def test_weights_and_scales_that_contradict_each_other_are_named(edit: Any, message: str, published: Path) -> None:
    change(published, edit)
    with pytest.raises((HFError, Misuse), match=message) as caught:
        open_hub(published)
    assert str(published) in str(caught.value)


def test_files_and_config_must_agree_on_fp8(published: Path, spec: ModelSpec, tmp_path: Path) -> None:
    config = json.loads((published / "config.json").read_text())
    (published / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "quantization_config"}))
    with pytest.raises(HFError, match=r"is F8_E4M3 with scales per block, but config\.json has no quantization_config"):
        open_hub(published)
    save_pretrained(build(spec, dtype=torch.bfloat16), tmp_path / "plain")
    (tmp_path / "plain" / "config.json").write_text(json.dumps(config))
    with pytest.raises(HFError, match="has quantization_config, but no tensor of the files is in FP8"):
        open_hub(tmp_path / "plain")


def test_scales_of_powers_of_two_stay_known(published: Path, tmp_path: Path) -> None:
    config = json.loads((published / "config.json").read_text())
    config["quantization_config"]["scale_fmt"] = "ue8m0"
    (published / "config.json").write_text(json.dumps(config))
    weights.save(open_hub(published)[0], tmp_path / "ours")
    found = open_weights(tmp_path / "ours")
    assert found.spec.precision.fp8 is not None and found.spec.precision.fp8.scales == "ue8m0"
    export(found, tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert again["quantization_config"] == config["quantization_config"]


def test_projections_that_stay_plain_are_listed_in_the_config(published: Path, tmp_path: Path) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[WEIGHT] = tensors[WEIGHT].bfloat16()
        del tensors[f"{WEIGHT}_scale_inv"]

    change(published, edit)
    weights.save(open_hub(published)[0], tmp_path / "ours")
    export(open_weights(tmp_path / "ours"), tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert again["quantization_config"]["modules_to_not_convert"] == [WEIGHT.removesuffix(".weight")]
    assert FILE_DTYPES[tensors_of(tmp_path / "again")[WEIGHT].dtype] == "BF16"
