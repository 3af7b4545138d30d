"""Other methods for modules that are already built: each is given a class derived from its own.

What a module is and holds stays as it was (``isinstance``, state dict, hooks, what others refer to); so do
copies and pickles, as EMA and multiprocessing make them. No class that anybody else uses is changed.
"""

import copyreg
import functools
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn


class Methods:
    """Base of a set of methods that replace those of the same names in a class.

    ``super()`` reaches the replaced ones, except where TorchScript compiles the method.
    """

    def __reduce_ex__(self, protocol):
        # pickle finds classes by name, and one that was derived at run time has none to be found by.
        base, sets = split(type(self))
        _, _, *state = super().__reduce_ex__(protocol)
        return _blank, (base, *sets), *state


@functools.cache
def derived(cls: type, methods: type[Methods]) -> type:
    """The class that is ``cls`` with those methods; always the same one."""
    name = f"{cls.__name__}With{methods.__name__}"
    namespace = {"__module__": methods.__module__, "__doc__": cls.__doc__, "_derived_from": (cls, methods)}
    return type(name, (methods, cls), namespace)


def split(cls: type) -> tuple[type, list[type[Methods]]]:
    """The class that a derived one began as, and the sets of methods it was given, the first one first."""
    sets: list[type[Methods]] = []
    while "_derived_from" in vars(cls):
        cls, methods = cls._derived_from
        sets.insert(0, methods)
    return cls, sets


def give_methods(model: nn.Module, table: Mapping[type, type[Methods]]) -> dict[str, str]:
    """Give all modules of a model, and the plain objects that they hold, the methods meant for their class.

    An object of a subclass gets them, too, unless the subclass has one of these methods of its own. What has
    them already keeps them, so a second call changes nothing.

    Args:
        model: is changed in place.
        table: by class, what it is to be given; of several that fit, the one of the closest base class.

    Returns:
        the reason, by name, for every object that was left as it is, although the table has its base class.
    """
    left = {}
    for name, thing in _things(model):
        base, _ = split(type(thing))
        stock = next((cls for cls in base.__mro__ if cls in table), None)
        if stock is None or isinstance(thing, table[stock]):
            continue
        reason = _obstacle(thing, base, stock, table[stock])
        if reason:
            left[name] = reason
        else:
            thing.__class__ = derived(type(thing), table[stock])
    return left


def _things(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every module once, and by the first of its names; and the attributes of each."""
    for name, module in model.named_modules():
        yield name, module
        for attribute, value in vars(module).items():
            yield f"{name}.{attribute}".lstrip("."), value


def _obstacle(thing: Any, base: type, stock: type, methods: type) -> str:
    for method in vars(methods):
        replaced = getattr(stock, method, None)
        if method.startswith("__") or replaced is None or not callable(replaced):
            continue
        if getattr(base, method) is not replaced or method in vars(thing):
            return f"{base.__name__} has its own {method}(), not that of {stock.__name__}"
    if reason := getattr(methods, "obstacle", lambda thing: "")(thing):
        return reason
    if base.__reduce__ is not object.__reduce__ or base.__reduce_ex__ is not object.__reduce_ex__:
        return f"{base.__name__} has its own way of being copied"
    return ""


def _blank(cls: type, *sets: type[Methods]) -> Any:
    """For unpickling: an instance without its state."""
    for methods in sets:
        cls = derived(cls, methods)
    return copyreg.__newobj__(cls)
