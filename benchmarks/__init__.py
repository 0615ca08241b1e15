"""Measurements: `python -m benchmarks.NAME`; `python -m pytest benchmarks` for single operations."""

import crd_fast  # noqa: F401  before torch: how OpenMP's threads wait
