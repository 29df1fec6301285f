"""Copies of functions in which some global names have other values."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

Choose = Callable[[types.FunctionType], dict[str, Any]]


def replace_globals(function: Any, choose: Choose) -> types.FunctionType | None:
    """Return the same code with some global names replaced, also inside decorators.

    The new globals have no ``__name__``: Dynamo looks up globals by module name, and other functions of that module,
    such as cross-attention, would get the replacement too.

    Args:
        function: a function of Python; None is returned for other callables.
        choose: returns the new values of the names that a function uses. If it is empty, None is returned.
    """
    if not isinstance(function, types.FunctionType):
        return None
    scope, closure = function.__globals__, function.__closure__ or ()
    if hasattr(function, "__wrapped__"):
        inner, holds = replace_globals(function.__wrapped__, choose), [_holds(c, function.__wrapped__) for c in closure]
        if inner is None or not any(holds):
            return None
        closure = tuple(types.CellType(inner) if hold else c for c, hold in zip(closure, holds, strict=True))
    elif values := choose(function):
        scope = scope | values
    else:
        return None
    scope = {name: value for name, value in scope.items() if name != "__name__"}
    copy = types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__, closure or None)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _holds(cell: types.CellType, value: Any) -> bool:
    try:
        return cell.cell_contents is value
    except ValueError:  # an empty cell
        return False
