"""Checks of single values, of config keys and arguments. Every message begins with the name of the value."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from numbers import Integral, Real
from typing import Any


def is_whole(value: Any) -> bool:
    """Whether a value is an integer; True and False are not."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_finite(value: Any) -> bool:
    """Whether a value is a number, neither infinite nor NaN; True and False are not."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def check_count(name: str, value: Any, minimum: int = 1) -> None:
    """Require a whole number.

    Raises:
        ValueError: it is none, or below ``minimum``.
    """
    if not is_whole(value) or value < minimum:
        raise ValueError(f"{name} must be a whole number of at least {minimum}, got {value!r}")


def check_pair(name: str, value: Any, minimum: int = 1) -> None:
    """Require two whole numbers, for height and width.

    Raises:
        ValueError: they are not two, or one is below ``minimum``.
    """
    valid = isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2
    if not valid or not all(is_whole(number) and number >= minimum for number in value):
        raise ValueError(
            f"{name} must be two whole numbers of at least {minimum}, for height and width; got {value!r}"
        )


def check_choice(name: str, value: Any, allowed: Collection[str]) -> None:
    """Require one of some words.

    Raises:
        ValueError: it is another.
    """
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; allowed are {', '.join(map(repr, allowed))}")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was too little memory: an error of Python, of torch, or of a library it calls."""
    words = ("DefaultCPUAllocator", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    # torch.OutOfMemoryError, by its name: this module does without torch.
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and any(word in str(error) for word in words))
    )
