"""Fine-tuning of flow models by a black-box reward: Centered Reward Distillation."""

import os

__version__ = "0.1.0"

# OpenMP reads them once, when torch is loaded, which is after this. A thread that waits then looks a thousand
# times, which outlasts most waits within an operation, and sleeps. By default it spins for milliseconds, and
# where another process wants the same cores each waits for what the other holds up.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # other runtimes than GNU's
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
