"""Methods from outside of the package: by the entry points of installed packages, or as ``module:Class``."""

from __future__ import annotations

import importlib
import sys
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path

from ..grid import short_repr
from ..method import Method
from .parser import parse
from .syntax import Call, nodes

GROUP = "dit_sparse.methods"


@cache
def installed_methods() -> dict[str, type[Method]]:
    """Return the methods of the entry points in the group ``dit_sparse.methods``, by name.

    Raises:
        ValueError: an entry point cannot be loaded, or is not a method.
    """
    methods = {}
    for point in entry_points(group=GROUP):
        try:
            methods[point.name] = _check(point.load(), point.value)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"the method {point.name!r} of an installed package cannot be loaded: {error}") from None
    return methods


def find_method(name: str) -> type[Method] | None:
    """Return an installed method, or ``module:Class`` of a module that is imported already; None if there is none.

    This function also reads text from files and from the page, so it never imports a module by name.
    """
    if ":" not in name:
        return installed_methods().get(name)
    module, _, attribute = name.partition(":")
    found = getattr(sys.modules.get(module), attribute, None)
    return None if found is None else _check(found, name)


def import_modules(text: str) -> str:
    """Import the modules of all ``module:Class`` in the text of a method, also from the working folder.

    Returns:
        The text.

    Raises:
        ValueError: a module cannot be imported, or has no such method.
    """
    for node in nodes(parse(text)):
        if not isinstance(node, Call) or ":" not in node.name:
            continue
        module, _, attribute = node.name.partition(":")
        folder, before = str(Path.cwd()), sys.path.copy()
        try:
            sys.path.insert(0, folder)
            found = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, SyntaxError) as error:
            raise ValueError(f"cannot import the method {short_repr(node.name)}: {error}") from None
        finally:
            sys.path[:] = before
        _check(found, node.name)
    return text


def external_name(cls: type[Method]) -> str:
    """Return the name by which `find_method` finds a class; of a class inside a function, its name."""
    installed = next((name for name, one in installed_methods().items() if one is cls), None)
    is_local = "<locals>" in cls.__qualname__ or "." in cls.__qualname__
    return installed or (cls.__name__ if is_local else f"{cls.__module__}:{cls.__qualname__}")


def _check(found: object, name: str) -> type[Method]:
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise ValueError(f"{short_repr(name)} is not a class of sparse-attention methods")
    return found
