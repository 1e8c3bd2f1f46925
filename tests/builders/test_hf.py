"""Hugging Face directories: what transformers saves loads here, what is saved here loads there, bit for bit."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import MtpModel

from modelspec.builders import build
from modelspec.builders.checkpoint import Position, model_tensors, save
from modelspec.builders.errors import Misuse, Refused
from modelspec.builders.hf import from_pretrained, inventory, save_pretrained
from modelspec.builders.model import Transformer
from modelspec.builders.tokenizer import train_bpe
from modelspec.dump import dump
from modelspec.hf_config import HFError, config_from_spec
from modelspec.schema import ModelSpec

Tiny = Callable[..., ModelSpec]

YARN = {"type": "yarn", "factor": 40, "original_max_position": 16, "beta_fast": 32, "beta_slow": 1}
VARIANTS: dict[str, dict[str, Any]] = {
    "v3-like": {},
    "queries-not-compressed": {"mla": {"q_lora_rank": None}},
    "yarn": {"mla": {"rope": {"scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}}}},
    "yarn-unequal-mscales": {"mla": {"rope": {"scaling": YARN | {"mscale": 0.5, "mscale_all_dim": 0.0}}}},
    "half-split": {"mla": {"rope": {"layout": "half_split"}}},
    "tied": {"model": {"tie_embeddings": True}},
    "no-groups": {"router": {"selection": {"groups": None}}},
    "two-shared-experts": {"moe": {"shared_experts": {"num": 2}}},
    "all-dense": {"model": {"layers": [{"repeat": 2, "attention": "mla", "ffn": "dense"}], "mtp": None}},
    "all-routed": {"model": {"layers": [{"repeat": 2, "attention": "mla", "ffn": "moe"}]}},
    "mtp-of-two": {"model": {"mtp": {"depth": 2}}},
    "no-mtp": {"model": {"mtp": None}},
}


def randomized(spec: ModelSpec, dtype: torch.dtype | None = None) -> Transformer:
    """A model none of whose tensors is like another."""
    model = build(spec, dtype=dtype)
    for tensor in model.state_dict().values():
        tensor.normal_(0, 0.3)
    return model


def assert_same_tensors(one: Transformer, other: Transformer) -> None:
    """Same names, dtypes and bits."""
    mine, theirs = one.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


def load_in_transformers(path: Path) -> Any:
    """transformers' model with the experts' loop that takes odd sizes."""
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    model.set_experts_implementation("eager")
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("parts", VARIANTS.values(), ids=VARIANTS.keys())
def test_a_round_trip_changes_no_bit_of_tensors_or_architecture(
    parts: dict[str, Any], dtype: torch.dtype, tiny: Tiny, tmp_path: Path
) -> None:
    model = randomized(tiny(**parts), dtype)
    save_pretrained(model, tmp_path / "saved")
    again = from_pretrained(tmp_path / "saved")
    assert_same_tensors(model, again)
    tokens = torch.randint(0, 61, (2, 20))
    assert torch.equal(model(tokens).logits, again(tokens).logits)
    assert list(again.spec.model.expanded_layers()) == list(model.spec.model.expanded_layers())
    assert again.spec.name == "saved"
    save_pretrained(again, tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "saved" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


@pytest.mark.parametrize("parts", VARIANTS.values(), ids=VARIANTS.keys())
def test_transformers_loads_what_is_saved_with_the_same_logits(
    parts: dict[str, Any], tiny: Tiny, tmp_path: Path
) -> None:
    model = randomized(tiny(**parts))
    save_pretrained(model, tmp_path / "saved")
    theirs = load_in_transformers(tmp_path / "saved")
    tokens = torch.randint(0, 61, (2, 40))
    torch.testing.assert_close(model(tokens).logits, theirs(tokens).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("parts", [{}, VARIANTS["yarn"], VARIANTS["tied"]], ids=["v3-like", "yarn", "tied"])
@pytest.mark.filterwarnings("ignore:.*multi-token prediction:UserWarning")  # transformers drops these weights.
def test_what_transformers_saves_loads_with_the_same_logits(
    parts: dict[str, Any], tiny: Tiny, twins: Any, tmp_path: Path
) -> None:
    theirs = twins(tiny(**parts)).theirs
    theirs.save_pretrained(tmp_path)
    ours = from_pretrained(tmp_path)
    assert ours.spec.model.mtp is None
    tokens = torch.randint(0, 61, (2, 40))
    torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits, rtol=0, atol=1e-5)


def test_transformers_finds_every_tensor_of_multi_token_prediction(tiny: Tiny, tmp_path: Path) -> None:
    # It knows these weights only behind 61 layers. It raises where one is missing.
    spec = tiny(
        model={
            "hidden_size": 4,
            "layers": [
                {"repeat": 3, "attention": "mla", "ffn": "dense"},
                {"repeat": 58, "attention": "mla", "ffn": "moe"},
            ],
        },
        mla={"num_heads": 1},
        moe={"num_experts": 2, "num_experts_per_tok": 1, "router": {"selection": {"groups": None}}},
    )
    model = randomized(spec)
    save_pretrained(model, tmp_path / "saved")
    module: Any = MtpModel.from_pretrained(load_in_transformers(tmp_path / "saved")).layers[0]
    ours = model.get_submodule("mtp.0").state_dict()
    assert torch.equal(module.eh_proj.weight, ours["proj.weight"])
    assert torch.equal(module.enorm.weight, ours["embedding_norm.weight"])
    assert torch.equal(module.hnorm.weight, ours["hidden_norm.weight"])
    assert torch.equal(module.post_norm.weight, ours["norm.weight"])
    assert torch.equal(module.mtp_block.mlp.gate.e_score_correction_bias, ours["block.ffn.router.selection_bias"])


def test_names_and_dtypes_are_those_of_the_hub(tiny: Tiny, tmp_path: Path) -> None:
    model = randomized(tiny(), torch.bfloat16)
    save_pretrained(model, tmp_path / "saved")
    tensors = load_file(tmp_path / "saved" / "model.safetensors")
    attention = "q_a_proj q_a_layernorm q_b_proj kv_a_proj_with_mqa kv_a_layernorm kv_b_proj o_proj"
    block = {f"self_attn.{name}.weight" for name in attention.split()}
    block |= {"input_layernorm.weight", "post_attention_layernorm.weight"}
    projections = {f"{name}_proj.weight" for name in ("gate", "up", "down")}
    routed = {f"mlp.experts.{e}.{name}" for e in range(10) for name in projections}
    routed |= {f"mlp.shared_experts.{name}" for name in projections}
    routed |= {"mlp.gate.weight", "mlp.gate.e_score_correction_bias"}
    mtp = {"enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight"}
    mtp |= {"shared_head.head.weight", "embed_tokens.weight"}
    layers = [block | {f"mlp.{name}" for name in projections}, block | routed, block | routed, block | routed | mtp]
    wanted = {f"model.layers.{index}.{name}" for index, names in enumerate(layers) for name in names}
    assert tensors.keys() == wanted | {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    for name, tensor in tensors.items():
        assert tensor.dtype == (torch.float32 if "bias" in name else torch.bfloat16), name


def test_large_models_are_cut_into_files_with_an_index(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modelspec.builders.tensor_writer.MAX_SHARD_BYTES", 20_000)
    model = randomized(tiny())
    save_pretrained(model, tmp_path / "saved")
    files = sorted(path.name for path in (tmp_path / "saved").glob("*.safetensors"))
    index = json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    stored = {name: tensor for file in files for name, tensor in load_file(tmp_path / "saved" / file).items()}
    assert index["weight_map"].keys() == stored.keys()
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in stored.values())
    assert max((tmp_path / "saved" / file).stat().st_size for file in files) < 30_000
    assert_same_tensors(model, from_pretrained(tmp_path / "saved"))
    theirs = load_in_transformers(tmp_path / "saved")
    tokens = torch.randint(0, 61, (1, 9))
    torch.testing.assert_close(model(tokens).logits, theirs(tokens).logits, rtol=1e-5, atol=1e-5)


def test_a_dtype_converts_all_but_the_selection_biases(tiny: Tiny, tmp_path: Path) -> None:
    save_pretrained(randomized(tiny()), tmp_path / "saved")
    for dtype, biases in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        model = from_pretrained(tmp_path / "saved", dtype=dtype)
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert {b.dtype for b in model.buffers()} == {biases}
        assert f"torch.{model.spec.precision.compute}" == str(model.compute_dtype) == str(dtype)
        assert model(torch.zeros(1, 3, dtype=torch.long)).logits.isfinite().all()


def test_a_dtype_that_models_are_not_built_in_is_misuse(saved: Path) -> None:
    with pytest.raises(Misuse, match=r"torch\.float16 is not supported; supported: float64, float32, bfloat16"):
        from_pretrained(saved, dtype=torch.float16)


@pytest.fixture
def saved(tiny: Tiny, tmp_path: Path) -> Path:
    """A directory to spoil."""
    save_pretrained(randomized(tiny()), tmp_path / "saved")
    return tmp_path / "saved"


def change(saved: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    """Rewrites the tensors of a directory."""
    tensors = load_file(saved / "model.safetensors")
    edit(tensors)
    save_file(tensors, saved / "model.safetensors")


def test_files_of_mixed_dtypes_keep_each(saved: Path) -> None:
    change(saved, lambda t: t.update({n: x.bfloat16() for n, x in t.items() if "norm" not in n}))
    model = from_pretrained(saved)
    assert model.get_parameter("norm.weight").dtype == torch.float32
    assert model.get_parameter("layers.1.ffn.experts.down_proj").dtype == torch.bfloat16
    assert model.get_buffer("layers.1.ffn.router.selection_bias").dtype == torch.float32
    assert model.compute_dtype == torch.bfloat16
    assert model(torch.zeros(1, 3, dtype=torch.long)).logits.dtype == torch.float32


def test_weights_of_multi_token_prediction_may_be_absent_with_one_warning(saved: Path) -> None:
    change(saved, lambda t: [t.pop(name) for name in list(t) if name.startswith("model.layers.3.")])
    with pytest.warns(UserWarning, match="multi-token prediction") as caught:
        model = from_pretrained(saved)
    assert len(caught) == 1
    assert len(model.mtp) == 0


def test_a_duplicate_that_differs_is_named(saved: Path) -> None:
    change(saved, lambda t: t["model.layers.3.embed_tokens.weight"].add_(1))
    with pytest.warns(UserWarning, match=r"model\.layers\.3\.embed_tokens\.weight differs"):
        from_pretrained(saved)


def test_duplicates_may_be_absent(saved: Path) -> None:
    before = from_pretrained(saved)
    change(saved, lambda t: [t.pop(f"model.layers.3.{n}.weight") for n in ("embed_tokens", "shared_head.head")])
    assert_same_tensors(before, from_pretrained(saved))


SPOILED: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "missing": (
        lambda t: t.pop("model.layers.1.mlp.experts.7.up_proj.weight"),
        r"experts\.7\.up_proj\.weight is missing",
    ),
    "many-missing": (lambda t: [t.pop(n) for n in list(t) if ".1." in n], r"\.\.\. are missing"),
    "part-of-mtp-missing": (lambda t: t.pop("model.layers.3.eh_proj.weight"), r"layers\.3\.eh_proj\.weight is missing"),
    "extra": (lambda t: t.update({"model.layers.0.bias": torch.ones(2)}), r"model\.layers\.0\.bias is not part"),
    "misshaped": (lambda t: t.update({"lm_head.weight": torch.ones(61, 23)}), r"lm_head\.weight has shape \[61, 23\]"),
    "transposed": (
        lambda t: t.update({"model.layers.1.mlp.experts.0.up_proj.weight": torch.ones(24, 7)}),
        r"has shape \[24, 7\], config\.json asks for \[7, 24\]",
    ),
    "half-precision": (lambda t: t.update({n: x.half() for n, x in t.items()}), r"F16; pass a dtype"),
    "integers": (lambda t: t.update({"model.norm.weight": torch.ones(24, dtype=torch.int32)}), r"I32"),
}


@pytest.mark.parametrize(("edit", "message"), SPOILED.values(), ids=SPOILED.keys())
def test_tensors_that_do_not_fit_are_one_error_naming_file_and_tensor(edit: Any, message: str, saved: Path) -> None:
    change(saved, edit)
    with pytest.raises((HFError, Refused), match=message) as caught:
        from_pretrained(saved)
    error: Any = caught.value
    assert str(saved) in str(error)
    assert error.exit_code == 1


def test_half_precision_loads_into_a_dtype(saved: Path) -> None:
    change(saved, lambda t: t.update({n: x.half() for n, x in t.items()}))
    assert from_pretrained(saved, dtype=torch.float32).norm.weight.dtype == torch.float32


def test_pickles_are_refused_with_the_reason(saved: Path) -> None:
    (saved / "model.safetensors").rename(saved / "pytorch_model.bin")
    with pytest.raises(Misuse, match="may run code"):
        from_pretrained(saved)


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no-config": (lambda d: (d / "config.json").unlink(), r"no config\.json"),
    "no-weights": (lambda d: (d / "model.safetensors").unlink(), r"neither model\.safetensors nor"),
    "truncated": (lambda d: (d / "model.safetensors").write_bytes(b"\x08\0\0"), r"not a readable safetensors file"),
    "not-safetensors": (lambda d: (d / "model.safetensors").write_text("x" * 999), r"not a readable safetensors file"),
    "config-not-json": (lambda d: (d / "config.json").write_text("{"), "not valid JSON"),
    "config-a-list": (lambda d: (d / "config.json").write_text("[]"), "not a JSON object"),
    "config-nan": (lambda d: (d / "config.json").write_text('{"a": NaN}'), "NaN is not a number in JSON"),
    "config-key-twice": (lambda d: (d / "config.json").write_text('{"a": 1, "a": 2}'), "twice"),
    "config-deep": (lambda d: (d / "config.json").write_text("[" * 100_000), "nested more than 32 deep"),
    "config-digits": (lambda d: (d / "config.json").write_text('{"a": ' + "1" * 10_000 + "}"), "not valid JSON"),
}


@pytest.mark.parametrize(("spoil", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_broken_directories_are_one_error(spoil: Any, message: str, saved: Path) -> None:
    spoil(saved)
    with pytest.raises((HFError, Misuse), match=message):
        from_pretrained(saved)


INDICES: dict[str, tuple[Any, str]] = {
    "outside": ({"lm_head.weight": "../model.safetensors"}, "not the name of a safetensors file"),
    "absolute": ({"lm_head.weight": "/etc/passwd"}, "not the name of a safetensors file"),
    "no-map": (None, "weight_map must map"),
    "numbers": ({"lm_head.weight": 3}, "weight_map must map"),
    "file-absent": ({"lm_head.weight": "a.safetensors"}, r"a\.safetensors: missing"),
    "tensor-elsewhere": ({"nowhere.weight": "b.safetensors"}, r"nowhere\.weight is missing"),
}


@pytest.mark.parametrize(("where", "message"), INDICES.values(), ids=INDICES.keys())
def test_an_index_that_lies_is_one_error(where: Any, message: str, saved: Path) -> None:
    (saved / "model.safetensors").rename(saved / "b.safetensors")
    (saved / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    with pytest.raises(Misuse, match=message):
        from_pretrained(saved)


def test_a_config_that_promises_absurd_sizes_allocates_nothing(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    config |= {
        "num_hidden_layers": 10_000,
        "n_routed_experts": 2**20,
        "n_group": 1,
        "topk_group": 1,
        "num_nextn_predict_layers": 0,
    }
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(HFError, match="are missing from the files"):
        from_pretrained(saved)


def test_an_occupied_folder_is_refused_and_left_alone(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    for path in (tmp_path, tmp_path / "mine.txt"):
        with pytest.raises(Misuse, match="not an empty folder"):
            save_pretrained(build(tiny()), path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_a_save_that_fails_leaves_nothing(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("modelspec.builders.hf.convert._write_json", fail)
    with pytest.raises(Exception, match="No space left"):
        save_pretrained(build(tiny()), tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_filled(tiny: Tiny, tmp_path: Path) -> None:
    save_pretrained(build(tiny()), tmp_path)
    assert (tmp_path / "config.json").exists()


def test_a_spec_that_the_family_cannot_say_writes_nothing(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(HFError, match=r"model\.attention\.mla\.latent_norm_eps"):
        save_pretrained(build(tiny(mla={"latent_norm_eps": 1e-5})), tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_missing_folder_is_misuse(tmp_path: Path) -> None:
    with pytest.raises(Misuse, match="not a folder"):
        from_pretrained(tmp_path / "nowhere")


def test_config_is_derived_from_the_spec_alone(saved: Path, tiny: Tiny) -> None:
    assert json.loads((saved / "config.json").read_text()) == config_from_spec(tiny(), "float32")
    shutil.rmtree(saved)


def test_the_name_map_covers_every_tensor_once(tiny: Tiny) -> None:
    model = tiny(model={"mtp": {"depth": 2}}).model
    pieces = list(inventory(model, "deepseek_v3"))
    assert len({piece.hub for piece in pieces}) == len(pieces)
    covered: dict[str, int] = {}
    for piece in pieces:
        view = piece.of(torch.empty(model.tensors()[piece.tensor].shape, device="meta"))
        covered[piece.tensor] = covered.get(piece.tensor, 0) + view.numel()
    assert covered == {name: tensor.numel for name, tensor in model.tensors().items()}


@pytest.fixture
def run(tiny: Tiny, tmp_path: Path) -> tuple[Path, Transformer]:
    """A run whose one checkpoint stands in its second stage, which turns YaRN on, and the model in it."""
    stage = {"steps": 1, "sequence_length": 8, "batch_size": 1, "learning_rate": 1e-3}
    scaling = YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}
    spec = tiny(
        mla={"rope": {"scaling": scaling}},
        training={
            "optimizer": {"type": "adamw", "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1},
            "stages": [stage | {"name": "short", "rope_scaling": "none"}, stage | {"name": "long"}],
        },
    )
    model = randomized(spec)
    tokenizer = train_bpe(["some text"], 257).to_str()
    position = Position(step=2, tokens=16, sequences=2, stage=1)
    save(tmp_path / "run" / "checkpoints", position, model_tensors(model), {}, dump(spec), tokenizer)
    return tmp_path / "run", model


@pytest.mark.parametrize("inside", [".", "checkpoints/step-2"], ids=["run", "checkpoint"])
def test_our_own_checkpoints_load_with_the_rope_of_their_stage(inside: str, run: tuple[Path, Transformer]) -> None:
    path, model = run
    again = from_pretrained(path / inside)
    assert_same_tensors(model, again)
    tokens = torch.randint(0, 61, (1, 40))
    assert torch.equal(model(tokens).logits, again(tokens).logits)
    assert again.spec.model.attention["mla"].rope == model.spec.model.attention["mla"].rope


def test_a_checkpoint_exports_to_what_transformers_loads(run: tuple[Path, Transformer], tmp_path: Path) -> None:
    path, model = run
    save_pretrained(from_pretrained(path), tmp_path / "exported")
    tokens = torch.randint(0, 61, (1, 40))
    theirs = load_in_transformers(tmp_path / "exported")
    torch.testing.assert_close(model(tokens).logits, theirs(tokens).logits, rtol=1e-5, atol=1e-5)


def test_a_checkpoint_takes_a_dtype(run: tuple[Path, Transformer]) -> None:
    assert {p.dtype for p in from_pretrained(run[0], dtype=torch.bfloat16).parameters()} == {torch.bfloat16}
