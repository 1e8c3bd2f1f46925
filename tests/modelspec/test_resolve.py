"""`extends`, `--set` and `like`: what wins, what goes, what is refused, and where each value came from."""

import copy
import os
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelspec.diagnostics import Diagnostic, Place, SpecError
from modelspec.document import parse
from modelspec.resolve import Resolved, resolve


class Folder:
    """A folder of specs, its own project."""

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "pyproject.toml").touch()

    def write(self, **files: str) -> None:
        for name, text in files.items():
            (self.path / f"{name}.yaml").write_text(dedent(text))

    def resolve(self, name: str, *overrides: str) -> Resolved:
        return resolve(self.path / f"{name}.yaml", overrides)

    def data(self, name: str, *overrides: str) -> dict[str, Any]:
        return self.resolve(name, *overrides).data()

    def refused(self, name: str, *overrides: str) -> Diagnostic:
        with pytest.raises(SpecError) as caught:
            self.resolve(name, *overrides)
        assert caught.value.exit_code == 1
        assert str(caught.value)
        (diagnostic,) = caught.value.diagnostics
        return diagnostic


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def test_maps_merge_and_lists_and_scalars_replace(folder: Folder) -> None:
    folder.write(
        base="model: {a: 1, b: {c: 2, d: 3}, layers: [1, 2, 3]}",
        leaf="extends: base.yaml\nmodel: {b: {d: 4, e: 5}, layers: [9]}",
    )
    assert folder.data("leaf") == {"model": {"a": 1, "b": {"c": 2, "d": 4, "e": 5}, "layers": [9]}}


def test_parents_merge_from_left_to_right_and_then_the_file(folder: Folder) -> None:
    folder.write(
        one="a: 1\nb: 1\nc: 1",
        two="b: 2\nc: 2",
        leaf="extends: [one.yaml, two.yaml]\nc: 3",
    )
    assert folder.data("leaf") == {"a": 1, "b": 2, "c": 3}


def test_where_both_state_a_type_and_differ_the_map_replaces(folder: Folder) -> None:
    folder.write(
        base="scaling: {type: yarn, factor: 40, beta_fast: 32}\nnorm: {type: rmsnorm, eps: 1}",
        leaf="extends: base.yaml\nscaling: {type: llama3, factor: 8}\nnorm: {type: rmsnorm, scale: 2}",
    )
    assert folder.data("leaf") == {
        "scaling": {"type": "llama3", "factor": 8},
        "norm": {"type": "rmsnorm", "eps": 1, "scale": 2},
    }


def test_null_removes_and_remembers_where(folder: Folder) -> None:
    folder.write(base="a: {b: 1, c: 2}\nd: 3", leaf="extends: base.yaml\na: {b: null}\nd: null\nnever: null")
    resolved = folder.resolve("leaf")
    assert resolved.data() == {"a": {"c": 2}}
    assert resolved.removed[("a", "b")].node.place.line == 2
    assert resolved.removed[("d",)].key_place.line == 3
    assert resolved.data_with_nulls() == {"a": {"b": None, "c": 2}, "d": None, "never": None}


def test_null_in_a_mixin_removes_what_another_parent_brings(folder: Folder) -> None:
    folder.write(
        base="model: {mtp: {depth: 1}, size: 2}",
        no_mtp="model: {mtp: null}",
        leaf="extends: [base.yaml, no_mtp.yaml]",
    )
    assert folder.data("leaf") == {"model": {"size": 2}}


def test_after_a_removal_a_map_starts_from_nothing(folder: Folder) -> None:
    folder.write(
        base="groups: {num: 8, topk: 4}",
        middle="extends: base.yaml\ngroups: null",
        leaf="extends: middle.yaml\ngroups: {num: 12}",
    )
    resolved = folder.resolve("leaf")
    assert resolved.data() == {"groups": {"num": 12}}
    assert resolved.removed[("groups",)].node.place == Place(str(folder.path / "middle.yaml"), 2, 9)


def test_nulls_go_from_maps_inside_lists_and_stay_as_items(folder: Folder) -> None:
    folder.write(leaf="layers: [{repeat: 2, norm: null}, null]")
    assert folder.data("leaf") == {"layers": [{"repeat": 2}, None]}


def test_name_and_summary_are_not_inherited_and_spec_version_is(folder: Folder) -> None:
    folder.write(base="spec_version: 1\nname: base\nsummary: text\na: 1", leaf="extends: base.yaml")
    assert folder.data("leaf") == {"spec_version": 1, "a": 1}


def test_paths_are_relative_to_the_file_that_names_them(folder: Folder) -> None:
    (folder.path / "sub").mkdir()
    (folder.path / "sub" / "middle.yaml").write_text("extends: ../base.yaml\nb: 2")
    folder.write(base="a: 1", leaf="extends: sub/middle.yaml")
    resolved = folder.resolve("leaf")
    assert resolved.data() == {"a": 1, "b": 2}
    assert resolved.place(("a",)) == Place(str(folder.path / "base.yaml"), 1, 4)


def test_every_value_knows_the_file_line_and_column_that_wrote_it_and_what_it_overrides(folder: Folder) -> None:
    folder.write(
        base="model:\n  size: 1\n  depth: 7\n",
        leaf="extends: base.yaml\nmodel:\n  size: 2\n",
    )
    base, leaf = (str(folder.path / f"{name}.yaml") for name in ("base", "leaf"))
    resolved = folder.resolve("leaf", "model.size=3")
    assert resolved.place(("model", "size")) == Place("--set", 1, 12)
    assert resolved.key_place(("model", "size")) == Place("--set", 1, 7)
    assert resolved.place(("model", "depth")) == Place(base, 3, 10)
    assert resolved.key_place(("model",)) == Place(leaf, 2, 1)
    assert [entry.node.place for entry in resolved.chain(("model", "size"))] == [
        Place("--set", 1, 12),
        Place(leaf, 3, 9),
        Place(base, 2, 9),
    ]
    assert resolved.documents == {
        base: (folder.path / "base.yaml").read_text(),
        leaf: (folder.path / "leaf.yaml").read_text(),
        "--set": "model.size=3",
    }


def test_an_absent_path_has_the_place_of_its_nearest_ancestor(folder: Folder) -> None:
    folder.write(leaf="a:\n  b: [{c: 1}]\n")
    resolved = folder.resolve("leaf")
    assert resolved.place(("a", "b", 0, "missing", "deeper")) == resolved.place(("a", "b", 0))
    assert resolved.place(("a", "missing")) == resolved.key_place(("a",))
    assert resolved.place(("missing",)) == Place(str(folder.path / "leaf.yaml"), 1, 1)


def test_a_shipped_spec_is_named_without_a_path(folder: Folder) -> None:
    folder.write(leaf="extends: modelspec:deepseek-v3\nname: mine")
    data = folder.data("leaf")
    assert data["name"] == "mine"
    assert data["model"]["hidden_size"] == 7168
    assert resolve("modelspec:deepseek-v3").data()["name"] == "deepseek-v3"


def test_a_shipped_spec_of_a_wrong_name_gets_a_suggestion(folder: Folder) -> None:
    folder.write(leaf="extends: modelspec:deepseek-v33")
    diagnostic = folder.refused("leaf")
    assert (diagnostic.code, diagnostic.place.line) == ("MS102", 1)
    assert diagnostic.help == "did you mean 'deepseek-v3'?"
    with pytest.raises(SpecError, match="did you mean"):
        resolve("modelspec:deepseek-v33")


def test_a_circle_shows_its_whole_chain_at_the_extends_that_closes_it(folder: Folder) -> None:
    folder.write(a="extends: b.yaml", b="x: 1\nextends: [c.yaml]", c="extends: b.yaml")
    diagnostic = folder.refused("a")
    assert diagnostic.code == "MS104"
    assert diagnostic.place == Place(str(folder.path / "c.yaml"), 1, 10)
    assert diagnostic.message.endswith(" -> ".join(str(folder.path / f"{name}.yaml") for name in "bcb"))


def test_a_spec_may_not_extend_itself_under_another_name(folder: Folder) -> None:
    folder.write(a="extends: link.yaml")
    (folder.path / "link.yaml").symlink_to("a.yaml")
    assert folder.refused("a").code == "MS104"


@pytest.mark.parametrize("value", ["5", "[a.yaml, 5]", "{a: b}", "null", "''", "true"])
def test_extends_takes_a_path_or_a_list_of_paths(folder: Folder, value: str) -> None:
    folder.write(a="x: 1", leaf=f"x: 1\nextends: {value}")
    assert (folder.refused("leaf").code, folder.refused("leaf").path) == ("MS101", "extends")


def test_a_parent_that_cannot_be_read_is_reported_where_it_is_named(folder: Folder) -> None:
    os.mkfifo(folder.path / "pipe")
    for name in ("missing.yaml", ".", "pipe"):
        folder.write(leaf=f"x: 1\nextends: {name}")
        diagnostic = folder.refused("leaf")
        assert (diagnostic.code, diagnostic.place) == ("MS102", Place(str(folder.path / "leaf.yaml"), 2, 10))


def test_a_parent_that_is_not_yaml_is_reported_in_the_parent(folder: Folder) -> None:
    folder.write(base="a: [1", leaf="extends: base.yaml")
    diagnostic = folder.refused("leaf")
    assert (diagnostic.code, diagnostic.place.file) == ("MS005", str(folder.path / "base.yaml"))


def test_everything_wrong_with_any_parent_is_told_at_once_and_once(folder: Folder) -> None:
    folder.write(
        leaf="extends: [middle.yaml, gone.yaml, 5, broken.yaml, modelspec:gone]",
        middle="extends: [leaf.yaml, broken.yaml, '']",
        broken="a: [1",
    )
    with pytest.raises(SpecError) as caught:
        folder.resolve("leaf")
    found = [(Path(each.place.file).name, each.place.column, each.code) for each in caught.value.diagnostics]
    assert found == [
        ("middle.yaml", 11, "MS104"),
        ("broken.yaml", 6, "MS005"),
        ("middle.yaml", 35, "MS101"),
        ("leaf.yaml", 24, "MS102"),
        ("leaf.yaml", 35, "MS101"),
        ("leaf.yaml", 51, "MS102"),
    ]
    assert "  1 | a: [1\n" in str(caught.value)


def test_more_parents_than_files_may_be_read_are_one_error(folder: Folder) -> None:
    folder.write(leaf=f"extends: [{', '.join(f'gone{number}.yaml' for number in range(33))}]")
    assert folder.refused("leaf").code == "MS105"


def test_extends_stays_inside_the_project(tmp_path: Path) -> None:
    (tmp_path / "outside.yaml").write_text("a: 1")
    (tmp_path / "project").mkdir()
    inside = Folder(tmp_path / "project")
    (inside.path / "link.yaml").symlink_to("../outside.yaml")
    for name in ("../outside.yaml", str(tmp_path / "outside.yaml"), "link.yaml", "/dev/zero", "https://x.org/a.yaml"):
        inside.write(leaf=f"extends: {name}")
        assert inside.refused("leaf").code == "MS103", name


def test_without_a_project_the_folder_of_the_spec_is_the_boundary(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "base.yaml").write_text("a: 1")
    (tmp_path / "sub" / "leaf.yaml").write_text("extends: ../base.yaml")
    with pytest.raises(SpecError, match="MS103"):
        resolve(tmp_path / "sub" / "leaf.yaml")
    (tmp_path / ".git").mkdir()
    assert resolve(tmp_path / "sub" / "leaf.yaml").data() == {"a": 1}


def test_a_long_row_of_parents_is_refused_and_many_paths_to_one_parent_cost_nothing(folder: Folder) -> None:
    for level in range(40):
        folder.write(
            **{f"row{level}": f"extends: row{level + 1}.yaml", f"grid{level}": f"extends: [grid{level + 1}.yaml]"}
        )
    assert folder.refused("row0").code == "MS105"
    for level in range(15):
        folder.write(**{f"grid{level}": f"extends: [{', '.join([f'grid{level + 1}.yaml'] * 9)}]"})
    folder.write(grid15="a: 1")
    assert folder.data("grid0") == {"a": 1}


def test_overrides_reach_into_lists_make_maps_and_remove(folder: Folder) -> None:
    folder.write(leaf="model: {layers: [{repeat: 1}, {repeat: 2}], fp8: {a: 1}}")
    assert folder.data(
        "leaf",
        "model.layers.1.repeat=4",
        "model.fp8=null",
        "training.checkpoint.keep_last=5",
        "model.norm={type: rmsnorm, eps: 1e-6}",
    ) == {
        "model": {"layers": [{"repeat": 1}, {"repeat": 4}], "norm": {"type": "rmsnorm", "eps": 1e-6}},
        "training": {"checkpoint": {"keep_last": 5}},
    }


def test_an_override_is_a_layer_like_a_file(folder: Folder) -> None:
    folder.write(leaf="a: {type: x, b: 1, c: [1, 2]}")
    assert folder.data("leaf", "a={b: 2}") == {"a": {"type": "x", "b": 2, "c": [1, 2]}}
    assert folder.data("leaf", "a={type: y}") == {"a": {"type": "y"}}
    assert folder.data("leaf", "a.type=y", "a.d=1") == {"a": {"type": "y", "d": 1}}
    assert folder.data("leaf", "a.c=[\n{d: 1},\n{e: 2}]") == {"a": {"type": "x", "b": 1, "c": [{"d": 1}, {"e": 2}]}}
    assert folder.data("leaf", "a=null", "a.b=3") == {"a": {"b": 3}}


@pytest.mark.parametrize(
    ("override", "code", "column"),
    [
        ("model.size", "MS111", 1),
        ("=4", "MS111", 1),
        ("model..size=4", "MS111", 1),
        ("model.size=", "MS111", 1),
        ("model.size=  ", "MS111", 1),
        (".".join(["a"] * 100) + "=1", "MS111", 1),
        ("model.size.inner=4", "MS112", 12),
        ("model.layers.2.repeat=4", "MS112", 14),
        ("model.layers.-1.repeat=4", "MS112", 14),
        ("model.layers.00.repeat=4", "MS112", 14),
        ("model.layers.01.repeat=4", "MS112", 14),
        ("model.layers.first=4", "MS112", 14),
        ("model.layers." + "9" * 5000 + "=4", "MS112", 14),
        ("extends=a.yaml", "MS112", 1),
        ("model.size=[1", "MS005", 14),
        ("model.size=.nan", "MS016", 12),
        ("model.size=1\0", "MS004", 13),
    ],
)
def test_a_wrong_override_is_reported_by_its_number(folder: Folder, override: str, code: str, column: int) -> None:
    folder.write(leaf="model: {size: 1, layers: [{repeat: 1}, {repeat: 2}]}")
    diagnostic = folder.refused("leaf", "model.size=2", override)
    assert (diagnostic.code, diagnostic.place) == (code, Place("--set", 2, column))


def test_all_wrong_overrides_are_reported_together(folder: Folder) -> None:
    folder.write(leaf="a: 1")
    with pytest.raises(SpecError) as caught:
        folder.resolve("leaf", "a", "b=1", "a.b=1")
    assert [diagnostic.place.line for diagnostic in caught.value.diagnostics] == [1, 3]
    assert "  3 | a.b=1" in str(caught.value)


LIKE = """
model:
  attention:
    swa: {type: gqa, num_heads: 8, window: 128, rope: {theta: 1}}
    csa: {like: swa, compression: {ratio: 4, indexer: {topk: 512}}, rope: {theta: 2}}
    hca: {like: csa, compression: {ratio: 128, indexer: null}}
"""


def test_like_writes_a_variant_as_its_difference_from_a_sibling(folder: Folder) -> None:
    folder.write(leaf=LIKE)
    attention = folder.data("leaf")["model"]["attention"]
    assert attention["csa"] == {
        "type": "gqa",
        "num_heads": 8,
        "window": 128,
        "rope": {"theta": 2},
        "compression": {"ratio": 4, "indexer": {"topk": 512}},
    }
    assert attention["hca"]["compression"] == {"ratio": 128}
    assert attention["hca"]["rope"] == {"theta": 2}


def test_like_comes_after_extends_and_overrides_so_that_a_change_reaches_the_copies(folder: Folder) -> None:
    folder.write(base=LIKE, leaf="extends: base.yaml\nmodel: {attention: {swa: {num_heads: 4}}}")
    for variant in folder.data("leaf")["model"]["attention"].values():
        assert variant["num_heads"] == 4
    for variant in folder.data("leaf", "model.attention.swa.num_heads=2")["model"]["attention"].values():
        assert variant["num_heads"] == 2


def test_like_can_be_taken_back(folder: Folder) -> None:
    folder.write(base=LIKE, leaf="extends: base.yaml\nmodel: {attention: {swa: null, csa: {like: null, type: mla}}}")
    assert folder.data("leaf")["model"]["attention"]["hca"]["type"] == "mla"


@pytest.mark.parametrize(
    ("variants", "code", "path", "hint"),
    [
        ("a: {like: b}, bb: {x: 1}", "MS121", "model.ffn.a.like", "did you mean 'bb'?"),
        ("a: {like: [b]}, b: {x: 1}", "MS121", "model.ffn.a.like", "there are a, b"),
        ("a: {like: b}, b: null", "MS121", "model.ffn.a.like", "there are a"),
        ("a: {like: a}", "MS122", "model.ffn.a.like", None),
        ("a: {like: b}, b: {like: c}, c: {like: a}", "MS122", "model.ffn.c.like", None),
        ("a: {like: b, type: y}, b: {type: x}", "MS123", "model.ffn.a.type", "leave `type` out"),
    ],
)
def test_like_of_the_wrong_thing_is_refused(
    folder: Folder, variants: str, code: str, path: str, hint: str | None
) -> None:
    folder.write(leaf=f"model: {{ffn: {{{variants}}}}}")
    diagnostic = folder.refused("leaf")
    assert (diagnostic.code, diagnostic.path) == (code, path)
    assert hint is None or hint in (diagnostic.help or "")


def test_like_cannot_be_used_to_grow_a_spec_without_bound(folder: Folder) -> None:
    row = ", ".join(f"v{index}: {{like: v{index + 1}}}" for index in range(2000))
    folder.write(row=f"model: {{ffn: {{{row}, v2000: {{type: x}}}}}}")
    assert folder.refused("row").code == "MS122"
    copies = ", ".join(f"v{index}: {{like: big}}" for index in range(1000))
    big = ", ".join(f"k{index}: 1" for index in range(1000))
    folder.write(copies=f"model: {{ffn: {{{copies}, big: {{{big}}}}}}}")
    with pytest.raises(SpecError) as caught:
        folder.resolve("copies")
    assert {diagnostic.code for diagnostic in caught.value.diagnostics} == {"MS122"}


KEYS = st.sampled_from(["a", "b", "c"])
LEAVES = st.none() | st.integers(0, 3) | st.lists(st.integers(0, 3), max_size=2)
TREES = st.dictionaries(
    KEYS, st.recursive(LEAVES, lambda inner: st.dictionaries(KEYS, inner, max_size=3), max_leaves=6)
)


def merge_patch(target: Any, patch: Any) -> Any:
    """RFC 7396, section 2, as its pseudocode has it."""
    if not isinstance(patch, dict):
        return patch
    merged = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = merge_patch(merged.get(key), value)
    return merged


def flow(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {flow(item)}" for key, item in value.items()) + "}"
    return "null" if value is None else str(value)


def paths(tree: Any, prefix: str = "") -> list[str]:
    if not isinstance(tree, dict):
        return [prefix]
    return [prefix] * bool(prefix) + [found for key in tree for found in paths(tree[key], f"{prefix}.{key}".strip("."))]


@given(TREES, TREES)
@settings(max_examples=100, deadline=None)
def test_extending_is_json_merge_patch(tmp_path_factory: pytest.TempPathFactory, base: Any, patch: Any) -> None:
    folder = tmp_path_factory.getbasetemp()
    (folder / "base.yaml").write_text(flow(base) + "\n")
    leaf = {"extends": "base.yaml"} | patch
    resolved = resolve(parse(flow(leaf), str(folder / "leaf.yaml")))
    assert resolved.data() == merge_patch(merge_patch({}, base), patch)


@given(TREES)
@settings(max_examples=50, deadline=None)
def test_an_empty_child_changes_nothing(tmp_path_factory: pytest.TempPathFactory, base: Any) -> None:
    folder = tmp_path_factory.getbasetemp()
    (folder / "base.yaml").write_text(flow(base) + "\n")
    child = resolve(parse("extends: base.yaml", str(folder / "leaf.yaml")))
    assert child.data() == resolve(folder / "base.yaml").data()


@given(TREES, st.data())
@settings(max_examples=100, deadline=None)
def test_an_override_with_null_removes_and_the_last_override_wins(tree: Any, data: st.DataObject) -> None:
    document = parse(flow(tree | {"kept": 1}), "a.yaml")
    path = data.draw(st.sampled_from([*paths(tree), "new.key"]))
    gone = resolve(document, [f"{path}=null"])
    last = resolve(document, [f"{path}=1", f"{path}=null", f"{path}=2"])
    steps = tuple(path.split("."))
    assert gone.node(steps) is None
    assert last.place(steps) == Place("--set", 3, len(path) + 2)
    expected = copy.deepcopy(last.data())
    inner = expected
    for step in steps[:-1]:
        inner = inner[step]
    assert inner[steps[-1]] == 2


@given(st.lists(st.text(st.sampled_from("abk.=[]{}:,-1 \n\"'&*!~"), max_size=12), max_size=3))
@settings(max_examples=150, deadline=None)
def test_any_overrides_give_a_spec_or_a_spec_error(overrides: list[str]) -> None:
    document = parse("a: {b: [1, {k: 2}]}", "a.yaml")
    try:
        resolve(document, overrides)
    except SpecError as error:
        assert all(diagnostic.place.file == "--set" for diagnostic in error.diagnostics)
        assert str(error)
