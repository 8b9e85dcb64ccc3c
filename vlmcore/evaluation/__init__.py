"""Benchmarks asked of a served model (`score`), and the conditions on their scores (`gates`)."""
