"""Gradio page of the demo in a checkout: ``python app.py`` is ``dit-sparse app``, see ``--help``."""

from __future__ import annotations

import sys

from dit_sparse.cli.main import main

if __name__ == "__main__":
    sys.argv[1:1] = ["app"]
    main()
