"""Names that the shell completes as values of options."""

from __future__ import annotations

from collections.abc import Callable, Iterable


def names(load: Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    """Return the completion of an option: the names that begin as its value does. ``load`` runs only for completion."""
    return lambda incomplete: [name for name in load() if name.startswith(incomplete)]


def methods() -> list[str]:
    """Return presets and methods."""
    from dit_sparse.methods import METHODS

    return [*presets(), *METHODS]


def presets() -> list[str]:
    from dit_sparse.notation.presets import PRESETS

    return list(PRESETS)


def profiles() -> list[str]:
    from dit_sparse.profiling.head_profile import profile_names

    return profile_names()


def executors() -> list[str]:
    from dit_sparse.kernels.executors import EXECUTORS

    return ["auto", *EXECUTORS]


def kinds() -> list[str]:
    from dit_sparse.methods import KINDS

    return list(KINDS)


def dtypes() -> list[str]:
    from dit_sparse.generation.loading import DTYPES

    return list(DTYPES)


def offloads() -> list[str]:
    from dit_sparse.generation.loading import OFFLOADS

    return list(OFFLOADS)
