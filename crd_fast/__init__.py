"""Fine-tuning of flow models by a black-box reward: Centered Reward Distillation."""

import os

__version__ = "0.1.0"

# OpenMP reads it once, when torch is loaded, which is after this. Its threads then sleep at a barrier; by
# default they spin, and where another process wants the same cores each waits for what the other holds up.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
