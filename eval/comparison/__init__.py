"""Compare methods on a model: clips made once, rows summarized, published settings reproduced."""
