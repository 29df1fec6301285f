"""``python -m dit_sparse.cli``, as ``accelerate launch`` needs it."""

from .main import main

main()
