"""Layouts tried without ranks: every tensor once, in whole or in parts, as the spec and the plan have it."""

import subprocess
import sys
from math import prod
from pathlib import Path

import pytest
from torch import distributed as dist

from modelspec import layout, schema
from modelspec.builders.parallel.check import differences, laid_out
from modelspec.plan.ranks import Batch, rank_memory
from modelspec.validate import load

ROOT = Path(__file__).parents[3]
NANO, V3, LLAMA = (ROOT / "specs" / name for name in ("deepseek-v3-nano.yaml", "deepseek-v3.yaml", "llama-3.1-8b.yaml"))
LAYOUTS = {
    "alone": (NANO, 1, []),
    "ZeRO 1": (NANO, 8, ["data.zero=1"]),
    "ZeRO 3, experts, tensor": (NANO, 16, ["data.zero=3", "data.replicate=2", "expert=4", "tensor=2"]),
    "dualpipev, experts": (NANO, 8, ["pipeline={size: 2, schedule: dualpipev}", "expert=4", "data.zero=1"]),
    "pipeline, context, ZeRO 2": (NANO, 8, ["pipeline.size=2", "context=2", "data.zero=2"]),
    "tensor ranks beyond keys' heads": (LLAMA, 32, ["tensor=16", "data.zero=3"]),
}


def laid(path: Path, world: int, changes: list[str]) -> schema.ModelSpec:
    sets = [f"parallelism.{change}" for change in changes]
    return load(path, ["training=null", "parallelism=null", f"parallelism={{world_size: {world}}}", *sets])


@pytest.mark.parametrize("name", LAYOUTS)
def test_ranks_hold_the_table_in_parts_and_as_many_parameters_as_plan_says(name: str) -> None:
    spec = laid(*LAYOUTS[name])
    ranks = tuple(laid_out(spec))
    assert differences(spec, ranks) == []
    planned = rank_memory(spec, Batch(64, 64))
    assert [rank.elements for rank in ranks] == [row.parameters for row in planned]
    assert [len(rank.layers) for rank in ranks] == [row.layers for row in planned]
    assert sorted(layer for rank in ranks for layer in rank.layers) == list(range(spec.model.num_layers))
    assert not dist.is_initialized()


def test_zero_leaves_each_rank_its_share_of_the_updates() -> None:
    (whole,) = laid_out(laid(NANO, 8, []))
    (share,) = laid_out(laid(NANO, 8, ["data.zero=1"]))
    assert whole.updated == whole.elements == share.elements
    # Rounded up to whole elements: the first rank has no less than the others.
    assert share.updated == -(-whole.elements // 8)


def test_a_tensor_that_stands_nowhere_or_in_too_few_parts_is_named() -> None:
    spec = laid(NANO, 8, ["expert=4"])
    ranks = tuple(laid_out(spec))
    assert differences(laid(NANO, 8, ["expert=2"]), ranks) == sorted(
        name for name, tensor in spec.tensors().items() if tensor.experts_per_token is not None
    )
    del ranks[0].parameters["norm.weight"]
    ranks[0].parameters["another.weight"] = (1,)
    assert differences(spec, ranks) == ["another.weight", "norm.weight"]


def test_the_published_layout_of_v3_is_tried_on_no_device() -> None:
    spec = load(V3, ["training=null", "parallelism.compile=none"])
    first, *_, last = ranks = tuple(laid_out(spec))
    assert differences(spec, ranks) == []
    assert len(ranks) == spec.parallelism.pipeline.size == 16
    assert (first.stages, last.stages) == ((0, 31), (15, 16))
    assert {shape[0] for name, shape in last.parameters.items() if ".ffn.experts." in name} == {256 // 64}
    everywhere = sum(
        prod(shape) * (spec.parallelism.expert if ".ffn.experts." in name else 1)
        for rank in ranks
        for name, shape in rank.parameters.items()
    )
    # Multi-token prediction reads the embedding, and under dualpipev first and last stage share a rank.
    biases = sum(prod(shape) for rank in ranks for shape in rank.buffers.values())
    assert everywhere + biases == 671_026_419_200 + 11_610_068_224
    assert layout.mesh(spec.parallelism).stages == 32


def build(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "modelspec", "build", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_build_check_prints_ranks_of_every_layout_and_refuses_what_validate_refuses(tmp_path: Path) -> None:
    done = build(str(NANO), "--check", "--world", "8", "--set", "parallelism.expert=4")
    assert done.returncode == 0, done.stderr
    assert "deepseek-v3-nano, pretrain: 8 ranks" in done.stdout
    assert "every tensor of the spec stands on the ranks, in whole or in parts" in done.stdout
    refused = build(str(NANO), "--check", "--world", "7", "--set", "parallelism.expert=4")
    assert (refused.returncode, "error[MS403]" in refused.stderr) == (1, True)
    both = build(str(NANO), "--check", "-o", str(tmp_path / "weights"))
    assert (both.returncode, both.stdout) == (2, "")
    assert not (tmp_path / "weights").exists()
