"""The ``dit-sparse`` command: one file per group of commands."""
