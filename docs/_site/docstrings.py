"""Griffe extension: docstrings as the API reference shows them."""

from __future__ import annotations

import importlib
import inspect
import re
from typing import Any

from griffe import Docstring, Extension, Object

WRITTEN_AT_IMPORT = {"dit_sparse.engine.enable": ("enable",)}  # by module
ROLE = re.compile(r":(?:class|meth|func|attr|mod):`~?([^`]+)`")


class Docstrings(Extension):
    """Reads docstrings that are completed at import from the module, and shows Sphinx roles as code."""

    def on_instance(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(r"`\1`", obj.docstring.value)

    def on_module_members(self, *, mod: Object, **_: Any) -> None:
        for name in WRITTEN_AT_IMPORT.get(mod.path, ()):
            function = getattr(importlib.import_module(mod.path), name)
            docstring = ROLE.sub(r"`\1`", inspect.cleandoc(function.__doc__))
            mod[name].docstring = Docstring(docstring, parent=mod[name])
