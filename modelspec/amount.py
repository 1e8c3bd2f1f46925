"""Counts as people say them."""


def amount(number: int) -> str:
    """A count in three to five digits: 671.03B."""
    for size, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= size:
            return f"{number / size:.2f}{unit}"
    return str(number)
