"""Presets: names for a method at a density, chosen from the comparisons in docs/benchmarks.md and docs/routed.md."""

PRESETS = {
    "quality": "routed(density=0.25)",
    "balanced": "routed(density=0.15)",
    "fast": "asa(density=0.25)",
}
