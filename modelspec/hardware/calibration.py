"""The calibration that comes with modelspec: rates fitted to published throughput by benchmarks/plan_calibration.py."""

from functools import cache
from pathlib import Path

from modelspec.schema.calibration import Calibration

FILE = Path(__file__).with_name("calibration.json")


@cache
def calibration() -> Calibration:
    """The rates, and what is known of software and devices."""
    return Calibration.model_validate_json(FILE.read_text(encoding="utf-8"))
