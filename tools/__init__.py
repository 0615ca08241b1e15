"""Programs for those who work on this package: `python -m tools.NAME`."""

import crd_fast  # noqa: F401  before torch: how OpenMP's threads wait
