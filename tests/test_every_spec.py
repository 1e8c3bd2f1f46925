"""Every shipped spec: the hinge, the published counts, and a tiny sibling that trains.

The hinge: the tensors that the schema states are the tensors that the builder makes, at full size. Counts are checked
twice, against published figures and against transformers' own class built from the published configuration, whose
keys stand in `published.json` and must read as the same model. The siblings in `tests/specs` have the same kinds of
layers at a size of milliseconds.
"""

import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from modelspec.builders import build
from modelspec.builders.model import LossWeights, Transformer
from modelspec.hf_config import Family, config_from_spec, spec_from_config
from modelspec.plan import parameters
from modelspec.resolve import resolve
from modelspec.schema import ModelSpec
from modelspec.schema.base import Tensors
from modelspec.validate import check, load

ROOT = Path(__file__).parents[1]
SPECS = sorted(path.stem for path in (ROOT / "specs").glob("*.yaml"))
LAPTOP = [name for name in SPECS if name.startswith("deepseek-v3-nano")]
PUBLISHED = [name for name in SPECS if name not in LAPTOP]
TINY = {name: ROOT / "tests" / "specs" / f"{name}-tiny.yaml" for name in PUBLISHED}
CONFIGS: dict[str, dict[str, Any]] = json.loads((ROOT / "tests" / "published.json").read_text())
# Models that share their architecture, number by number, with another.
SAME = {"deepseek-r1": "deepseek-v3", "deepseek-v3.1": "deepseek-v3", "qvq-72b-language": "qwen2.5-72b"}

V3, V3_ACTIVE = 671_026_419_200, 37_552_297_472
TOTAL = {
    "deepseek-v2": 235_741_434_880,
    "deepseek-v2-lite": 15_706_484_224,
    "deepseek-v3": V3,
    "deepseek-v3.1": V3,
    "deepseek-r1": V3,
    "deepseek-v3.2": V3 + 851_524_864,
    "kimi-k2": 1_026_408_232_448,
    "glm-4.5": 352_797_829_024,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-235b-a22b": 235_093_634_560,
    "qwen3-next-80b-a3b": 79_674_391_296,
    "llama-3.1-405b": 405_853_388_800,
    "mixtral-8x7b": 46_702_792_704,
    "gpt-oss-120b": 116_829_156_672,
}
# With embedding and head. V3.2's indexers score every key, so all of them are at work.
ACTIVE = {
    "deepseek-v2": 21_375_800_320,
    "deepseek-v2-lite": 2_661_150_208,
    "deepseek-v3": V3_ACTIVE,
    "deepseek-v3.1": V3_ACTIVE,
    "deepseek-r1": V3_ACTIVE,
    "deepseek-v3.2": V3_ACTIVE + 851_524_864,
    "kimi-k2": 32_861_500_928,
    "glm-4.5": 33_632_266_144,
}
# As announced: total and active. GLM-4.5's 355B is left out: it is between the main model's 352.8B and the 358.3B of
# the files, which repeat embedding and head for multi-token prediction.
ANNOUNCED: dict[str, tuple[str | None, str | None]] = {
    "deepseek-v2": ("236B", "21B"),
    "deepseek-v2-lite": ("15.7B", "2.4B"),
    "deepseek-v3": ("671B", "37B"),
    "deepseek-v3.1": ("671B", "37B"),
    "deepseek-r1": ("671B", "37B"),
    "deepseek-v3.2": ("671B", "37B"),
    "kimi-k2": ("1.0T", "32B"),
    "deepseek-vl2-language": ("27B", "4.1B"),
    "glm-4.5": (None, "32B"),
    "glm-4.5-air": ("106B", "12B"),
    "qwen2.5-72b": ("72.7B", None),
    "qwen2.5-7b": ("7.6B", None),
    "qvq-72b-language": ("72.7B", None),
    "qwen3-235b-a22b": ("235B", "22B"),
    "qwen3-30b-a3b": ("30.5B", "3.3B"),
    "qwen3-next-80b-a3b": ("80B", "3B"),
    "llama-3.1-8b": ("8B", None),
    "llama-3.1-70b": ("70B", None),
    "llama-3.1-405b": ("405B", None),
    "mixtral-8x7b": ("46.7B", "12.9B"),
    "gpt-oss-20b": ("20.91B", "3.61B"),
    "gpt-oss-120b": ("116.83B", "5.13B"),
}


def total(tensors: Tensors) -> int:
    """Elements of a table."""
    return sum(tensor.numel for tensor in tensors.values())


@pytest.fixture(scope="module", params=SPECS)
def built(request: pytest.FixtureRequest) -> tuple[ModelSpec, Transformer]:
    """A shipped spec and its model at full size, without memory."""
    spec = load(f"modelspec:{request.param}")
    return spec, build(spec, device="meta")


def test_the_table_of_tensors_is_the_model_at_full_size(built: tuple[ModelSpec, Transformer]) -> None:
    spec, model = built
    parameters = {name: ("parameter", tuple(p.shape)) for name, p in model.named_parameters()}
    persistent = model.state_dict().keys() - parameters.keys()
    buffers = {name: ("buffer", tuple(model.get_buffer(name).shape)) for name in persistent}
    table = spec.tensors()
    assert {name: (tensor.kind, tensor.shape) for name, tensor in table.items()} == parameters | buffers
    for name, tensor in table.items():
        if tensor.dtype is not None:
            assert str(model.state_dict()[name].dtype) == f"torch.{tensor.dtype}", name


def test_no_two_names_are_one_tensor(built: tuple[ModelSpec, Transformer]) -> None:
    _, model = built
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    assert len({id(tensor) for _, tensor in named}) == len(named)


@pytest.mark.parametrize("name", SPECS)
def test_validate_has_no_warning(name: str) -> None:
    spec, diagnostics = check(resolve(f"modelspec:{name}"))
    assert spec is not None
    assert spec.name == name
    assert spec.summary
    assert [diagnostic for diagnostic in diagnostics if diagnostic.severity != "info"] == []


@pytest.mark.parametrize("name", TOTAL)
def test_the_total_is_the_known_one(name: str) -> None:
    assert parameters(load(f"modelspec:{name}")).total == TOTAL[name]


@pytest.mark.parametrize("name", ACTIVE)
def test_the_active_count_is_the_known_one(name: str) -> None:
    assert parameters(load(f"modelspec:{name}")).active == ACTIVE[name]


def announces(figure: str, counts: list[int]) -> bool:
    """Whether one of the counts is less than a unit of the figure's last digit away: rounded, or cut off."""
    unit = {"B": 10**9, "T": 10**12}[figure[-1]]
    digits = len(figure[:-1].partition(".")[2])
    return any(abs(count / unit - float(figure[:-1])) < 10**-digits for count in counts)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_announced_figures_are_met(name: str) -> None:
    counts = parameters(load(f"modelspec:{name}"))
    whole, active = ANNOUNCED[name]
    assert whole is None or announces(whole, [counts.total])
    # Authors count embedding and head, the head alone, or neither.
    embedding, head = counts.parts["embedding"], counts.parts["head"]
    active_counts = [counts.active, counts.active - embedding, counts.active - embedding - head]
    assert active is None or announces(active, active_counts)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_total_is_that_of_transformers_class(name: str) -> None:
    keys = dict(CONFIGS[SAME.get(name, name)])
    config = AutoConfig.for_model(keys.pop("model_type"), **keys)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    biases = {name: buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")}
    theirs = [*model.parameters(), *biases.values()]
    assert sum(tensor.numel() for tensor in theirs) == parameters(load(f"modelspec:{name}")).total


@pytest.mark.parametrize("name", [name for name, keys in CONFIGS.items() if keys["model_type"] in get_args(Family)])
def test_the_published_configuration_says_the_same_model(name: str) -> None:
    theirs = config_from_spec(spec_from_config(CONFIGS[name], name), "bfloat16")
    assert config_from_spec(load(f"modelspec:{name}"), "bfloat16") == theirs


def test_v3_has_the_published_counts_of_its_parts() -> None:
    model = load("modelspec:deepseek-v3").model
    main = model.main_tensors()
    assert total(model.mtp_tensors()) == 11_610_068_224
    biases = {name: tensor for name, tensor in main.items() if tensor.kind == "buffer"}
    assert total(biases) == 14_848
    assert all(name.endswith("selection_bias") and tensor.dtype == "float32" for name, tensor in biases.items())


@pytest.mark.parametrize("name", SAME)
def test_a_model_with_anothers_architecture_differs_in_nothing(name: str) -> None:
    assert load(f"modelspec:{name}").model == load(f"modelspec:{SAME[name]}").model


def kinds(spec: ModelSpec) -> set[str]:
    """Names of tensors without the index of their layer."""
    return {name.split(".", 2)[-1] for name in spec.tensors() if name.startswith(("layers.", "mtp."))}


def test_nano_has_every_mechanism_of_v3() -> None:
    nano, v3 = load("modelspec:deepseek-v3-nano"), load("modelspec:deepseek-v3")
    assert kinds(nano) == kinds(v3)
    assert nano.model.num_layers >= 4
    assert total(nano.tensors()) < 20e6


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_tiny_sibling_has_every_mechanism(name: str) -> None:
    tiny, full = load(TINY[name]), load(f"modelspec:{name}")
    assert kinds(tiny) == kinds(full)
    layers = [{(layer.attention, layer.ffn) for layer in spec.model.expanded_layers()} for spec in (tiny, full)]
    assert layers[0] == layers[1]
    assert 2 <= tiny.model.num_layers <= 4
    assert total(tiny.tensors()) < 100e3


@pytest.mark.parametrize("path", [*TINY.values(), ROOT / "specs" / "deepseek-v3-nano.yaml"], ids=lambda path: path.stem)
def test_a_small_sibling_learns(path: Path) -> None:
    spec, diagnostics = check(resolve(path))
    assert spec is not None
    assert [diagnostic for diagnostic in diagnostics if diagnostic.severity != "info"] == []
    model = build(spec)
    tokens = torch.randint(0, spec.model.vocab_size, (2, 24))
    targets = tokens.roll(-1, dims=1).index_fill(1, torch.tensor([23]), -100)
    weights = LossWeights(mtp=0.3, balance=0.01)

    before = model(tokens, targets=targets, loss_weights=weights)
    before.loss.backward()
    assert (before.losses.mtp is not None) == (spec.model.mtp is not None)
    assert_what_learns_has_a_gradient(model, before.expert_counts)
    torch.optim.SGD(model.parameters(), lr=0.05).step()
    after = model(tokens, targets=targets, loss_weights=weights)
    assert after.loss < before.loss


def assert_what_learns_has_a_gradient(model: Transformer, expert_counts: dict[str, torch.Tensor]) -> None:
    """All parameters but those of indexers, which a language-model loss does not reach; of experts only chosen ones."""
    for name, parameter in model.named_parameters():
        if ".indexer." in name:
            assert parameter.grad is None, name
            continue
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        layer, experts, _ = name.partition(".experts.")
        if experts:
            reached = parameter.grad.flatten(1).abs().sum(-1) > 0
            assert not (reached & (expert_counts[f"{layer}.router"] == 0)).any(), name
        assert parameter.grad.abs().sum() > 0, name


def test_the_page_of_models_has_every_spec_with_its_counts() -> None:
    page = (ROOT / "docs" / "models.md").read_text()
    rows = re.findall(r"^\| `([^`]+)` \|[^|]*\| ([^|]*) \| ([^|]*) \|", page, re.MULTILINE)
    counts = {name: parameters(load(f"modelspec:{name}")) for name in SPECS}
    assert sorted(rows) == [(name, f"{counts[name].total:,}", f"{counts[name].active:,}") for name in SPECS]
