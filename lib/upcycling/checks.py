"""Messages for bad values: one clear sentence that names the value and the remedy."""

import operator

IGNORE = -100  # the target that no loss counts: padding (torch's cross_entropy skips it by default)


def _one_of(name: str, value, choices: tuple) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(map(repr, choices))}")


def _at_least(minimum: float, **values) -> None:
    for name, value in values.items():
        if not value >= minimum:  # written so that NaN fails too
            raise ValueError(f"{name}={value!r} is too small; choose at least {minimum}")


def whole_number(name: str, value) -> int:
    """`value` as int; ValueError for what is no integer of Python, NumPy or torch, and for True and 2.0."""
    try:
        if str(getattr(value, "dtype", type(value).__name__)).removeprefix("torch.") == "bool":
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name}={value!r} is not a whole number") from None
