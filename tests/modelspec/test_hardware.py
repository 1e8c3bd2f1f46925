"""Hardware files: what ships is sound and says where it is from, and what a user writes is answered in diagnostics."""

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from jsonschema import Draft202012Validator

from modelspec import hardware, json_schema
from modelspec.cli import app
from modelspec.diagnostics import Diagnostic, SpecError
from modelspec.hardware import load, names
from modelspec.hardware.relations import figures
from modelspec.resolve import resolve
from modelspec.schema.hardware import Hardware

# Of one device, from vendors' tables by another way than the files: TFLOP/s without sparsity of BF16 and FP8, GB of
# memory as it is sold, TB/s, watts.
SOLD = {
    "h800": (989, 1979, 80, 3.35, 700),
    "h100": (989, 1979, 80, 3.35, 700),
    "h200": (989, 1979, 141, 4.8, 700),
    "b200": (36_000 / 8 / 2, 72_000 / 8 / 2, 180, 7.7, 1000),
    "b300": (36_000 / 8 / 2, 72_000 / 8 / 2, 288, 7.7, 1100),
    "gb200": (360_000 / 72 / 2, 720_000 / 72 / 2, 186, 576 / 72, 1200),
    "gb300": (360_000 / 72 / 2, 720_000 / 72 / 2, 288, 576 / 72, 1400),
    "mi300x": (1307.4, 2614.9, 192 * 2**30 / 1e9, 5.3, 750),
    "mi355x": (1024 * 1024 * 2.4e-3, 1024 * 2048 * 2.4e-3, 288 * 2**30 / 1e9, 8.0, 1400),
    "ascend-910c": (752 / 2, None, 64 * 2**30 / 1e9, 3.2 / 2, 559_000 / 768),
}


def faults(path: Path, text: str) -> tuple[Diagnostic, ...]:
    """What is wrong with a file of this text."""
    path.write_text(text)
    with pytest.raises(SpecError) as error:
        load(path)
    return error.value.diagnostics


def test_exactly_the_promised_hardware_ships() -> None:
    assert set(names()) == SOLD.keys()


@pytest.mark.parametrize("name", SOLD)
def test_a_device_has_the_figures_of_its_vendor(name: str) -> None:
    bfloat16, fp8, memory, bandwidth, watts = SOLD[name]
    hardware = load(name)
    assert hardware.name == name
    assert hardware.peak_flops.bfloat16 == pytest.approx(bfloat16 * 1e12, rel=1e-3)
    assert hardware.peak_flops.fp8 == (None if fp8 is None else pytest.approx(fp8 * 1e12, rel=1e-3))
    # Some of it is kept for error correction and by the driver; 80 GB are sold of somewhat more.
    assert 0.95 * memory * 1e9 < hardware.memory < 1.07 * memory * 1e9
    assert hardware.memory_bandwidth == pytest.approx(bandwidth * 1e12)
    assert hardware.power == pytest.approx(watts, rel=1e-3)


@pytest.mark.parametrize("name", SOLD)
def test_every_figure_says_where_it_is_from(name: str) -> None:
    hardware = load(name)
    told = {field for source in hardware.sources for field in source.fields}
    stated = {".".join(path) for path in figures(Hardware) if _value(hardware, path) is not None} - {"vendor"}
    assert {path for path in stated - {"peak_flops"} if not {path, path.partition(".")[0]} & told} == set()
    if hardware.price:
        assert "https://" in hardware.price.source


def _value(hardware: Hardware, path: tuple[str, ...]) -> object:
    value: object = hardware
    for step in path:
        value = getattr(value, step)
    return value


def test_the_h800_is_an_h100_with_less_nvlink_at_the_price_of_the_report() -> None:
    h800, h100 = load("h800"), load("h100")
    assert h800.node_bandwidth == 400e9 / 2 and h100.node_bandwidth == 900e9 / 2
    assert h800.network_bandwidth == 400e9 / 8
    assert h800.peak_flops.float64 == 1e12
    same = {"memory", "memory_bandwidth", "gpus_per_node", "fast_domain", "network_bandwidth", "power"}
    assert h800.model_dump(include=same) == h100.model_dump(include=same)
    assert h800.price and h800.price.usd_per_hour == 2.0 and "2412.19437" in h800.price.source


def test_an_unknown_name_is_answered_with_the_nearest_and_the_way_to_a_file() -> None:
    with pytest.raises(SpecError) as error:
        load("gb3000")
    (fault,) = error.value.diagnostics
    assert error.value.exit_code == 2
    assert fault.help and "did you mean 'gb300'?" in fault.help and "./gb3000.yaml" in fault.help


def test_a_name_like_no_other_is_answered_with_all_there_are() -> None:
    with pytest.raises(SpecError) as error:
        load("zzz")
    assert all(name in str(error.value) for name in names())


def test_a_missing_file_is_misuse(tmp_path: Path) -> None:
    with pytest.raises(SpecError) as error:
        load(tmp_path / "mine.yaml")
    assert error.value.exit_code == 2


def test_a_file_of_ones_own_extends_what_ships(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "extends: modelspec:hardware/h100\nname: mine\nsummary: Ours.\nprice: null\npeak_flops: {fp8: null}\n"
    )
    mine, h100 = load(path), load("h100")
    assert (mine.name, mine.price, mine.peak_flops.fp8) == ("mine", None, None)
    assert mine.memory == h100.memory and mine.peak_flops.bfloat16 == h100.peak_flops.bfloat16


def test_extending_what_does_not_ship_names_the_nearest(tmp_path: Path) -> None:
    (fault,) = faults(tmp_path / "mine.yaml", "extends: modelspec:hardware/h10\nname: mine\nsummary: Ours.\n")
    assert fault.code == "MS102" and "hardware" in fault.message and fault.help and "'h100'" in fault.help


BASE = "extends: modelspec:hardware/h100\nname: mine\nsummary: Ours.\n"


@pytest.mark.parametrize(
    ("line", "code", "column", "hint"),
    [
        ("memroy: 80e9", "MS201", 1, "did you mean 'memory'?"),
        ("memory: 80", "MS204", 9, None),
        ("power: '700'", "MS203", 8, "remove the quotes"),
        ("sources: [{fields: [power], text: us}]", "MS202", 11, "published"),
        ("price: {usd_per_hour: 2, source: us, date: yesterday}", "MS207", 44, None),
        ("peak_flops: {fp8: 98.9e12}", "MS701", 19, "without sparsity"),
        ("price: {usd_per_hour: 2}", "MS705", 23, "together"),
        ("fast_domain: 12", "MS702", 14, "8 or 16"),
        ("fast_domain: 4", "MS702", 14, "8 or 16"),
        ("network_bandwidth: 460e9", "MS703", 20, "400 Gbit/s are 50e9"),
        ("node_bandwidth: 3.6e12", "MS703", 17, "take half"),
        ("stack: nope", "MS706", 8, "megatron-bridge-26.08"),
        ("stack: megatron-bridge-26.05", "MS706", 8, "did you mean"),
        ("slowdown: 1e300", "MS204", 11, None),
        ("slowdown: 0.001", "MS204", 11, None),
        ("power: 1e6", "MS204", 8, None),
        ("price: {usd_per_hour: 1e6, source: us, date: 2026-01}", "MS204", 23, None),
        ("sources: [{fields: [power, peak_flop], text: us, date: 2026-08}]", "MS704", 28, "'peak_flops'"),
    ],
)
def test_a_fault_has_its_place_and_a_remedy(
    tmp_path: Path, line: str, code: str, column: int, hint: str | None
) -> None:
    text = f"{BASE}{line}\n"
    (fault,) = faults(tmp_path / "mine.yaml", text)
    assert (fault.code, fault.place.line, fault.place.column) == (code, 4, column)
    assert hint is None or (fault.help and hint in fault.help)


def test_a_text_that_is_no_hardware_file_is_told_as_one(tmp_path: Path) -> None:
    for text, code in (("", "MS006"), ("# nothing\n", "MS006"), ("- h100\n", "MS008")):
        (fault,) = faults(tmp_path / "mine.yaml", text)
        assert fault.code == code and "spec" not in fault.message
        assert fault.help and "extends: modelspec:hardware/h100" in fault.help


def test_an_empty_name_is_answered_with_what_there_is() -> None:
    with pytest.raises(SpecError) as error:
        load("")
    assert error.value.exit_code == 2 and "empty" in str(error.value) and "h100" in str(error.value)


def test_a_file_that_extends_needs_no_summary_and_one_that_does_not_needs_it(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("extends: modelspec:hardware/h100\nname: mine\n")
    assert load(path).summary == "Extends h100."
    whole = {"kind": "cpu", "name": "mine"}
    assert any("summary" in fault.message for fault in faults(path, json.dumps(whole)))


def test_all_relations_are_told_at_once(tmp_path: Path) -> None:
    found = faults(tmp_path / "mine.yaml", f"{BASE}fast_domain: 12\nnode_bandwidth: 9e12\nnetwork_bandwidth: 9.1e12\n")
    assert [fault.code for fault in found] == ["MS702", "MS703", "MS703"]


def test_equal_rates_and_equal_bandwidths_contradict_nothing(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        f"{BASE}peak_flops: {{float32: 9e12, tf32: 9e12, bfloat16: 9e12, fp8: 9e12}}\n"
        "memory_bandwidth: 50e9\nnode_bandwidth: 50e9\nnetwork_bandwidth: 50e9\n"
    )
    assert load(path).peak_flops.fp8 == 9e12


@pytest.mark.parametrize("name", SOLD)
def test_other_programs_can_check_a_hardware_file(name: str) -> None:
    written = resolve(str(Path(hardware.__file__).parent / f"{name}.yaml")).data()
    whole = Draft202012Validator(json_schema.hardware(resolved=True))
    whole.validate(written)
    assert whole.is_valid(load(name).model_dump(mode="json", exclude_none=True))
    assert not whole.is_valid({key: value for key, value in written.items() if key != "memory"})


def test_an_editor_knows_a_file_that_extends_and_an_unknown_key_in_it() -> None:
    partial = Draft202012Validator(json_schema.hardware())
    assert partial.is_valid({"extends": "modelspec:hardware/h100", "name": "mine", "peak_flops": {"fp8": None}})
    assert not partial.is_valid({"extends": "modelspec:hardware/h100", "memroy": 1})
    assert not partial.is_valid({"power": "700"})


def test_the_command_prints_it() -> None:
    runner = CliRunner()
    assert json.loads(runner.invoke(app, ["schema", "--hardware"]).stdout) == json_schema.hardware()
    resolved = runner.invoke(app, ["schema", "--hardware", "--resolved"]).stdout
    assert json.loads(resolved) == json_schema.hardware(resolved=True)


def test_the_help_of_plan_names_what_ships() -> None:
    said = CliRunner().invoke(app, ["plan", "--help"], env={"COLUMNS": "200"}).stdout
    assert all(name in said for name in names())


PAGE = (Path(__file__).parents[2] / "docs" / "hardware-files.md").read_text()


@pytest.mark.parametrize("name", SOLD)
def test_the_table_of_the_page_is_current(name: str) -> None:
    device = load(name)
    rates = device.peak_flops.bfloat16, device.peak_flops.fp8
    links = device.node_bandwidth, device.network_bandwidth
    numbers = [
        f"{device.memory / 2**30:.1f} GiB",
        *("-" if rate is None else f"{rate / 1e12:,.0f}" for rate in rates),
        *(f"{link / 1e9:.0f}" for link in links),
        f"{device.price.usd_per_hour:.2f}" if device.price else "-",
    ]
    (row,) = (line for line in PAGE.splitlines() if line.startswith(f"| `{name}` |"))
    assert row.strip("| ").split(" | ")[2:] == numbers


def test_the_file_of_the_page_loads(tmp_path: Path) -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "our-cluster.yaml").write_text(text)
    ours = load(tmp_path / "our-cluster.yaml")
    assert ours.network_bandwidth == 100e9 and ours.memory == load("h100").memory


def test_the_page_tells_every_key() -> None:
    assert [key for key in Hardware.model_fields if f"`{key}`" not in PAGE] == []
    assert all(f"MS70{digit}" in PAGE for digit in range(1, 7))
