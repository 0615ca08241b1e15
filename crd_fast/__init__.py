"""Fine-tuning of flow models by a black-box reward: Centered Reward Distillation."""

__version__ = "0.1.0"
