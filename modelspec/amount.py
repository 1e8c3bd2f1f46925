"""Counts as people say them."""


def amount(number: int) -> str:
    """A count in three to five digits: 671.03B."""
    for size, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= size:
            return f"{number / size:.2f}{unit}"
    return str(number)


def flop_amount(number: int) -> str:
    """Floating-point operations as people say them: 250.45 GFLOP."""
    for size, unit in ((10**15, "PFLOP"), (10**12, "TFLOP"), (10**9, "GFLOP"), (10**6, "MFLOP"), (10**3, "KFLOP")):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number} FLOP"


def amount_of_bytes(count: int) -> str:
    """A size as people say it: 688.57 GB."""
    for size, unit in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "KB")):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} bytes"


def figure(value: float) -> str:
    """A measured or estimated number: whole from 100 on, else its first three digits. 2,788; 55.8; 0.00123; 1.2e-07."""
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:.3g}"
