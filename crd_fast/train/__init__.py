"""The training algorithm: rollout, update, evaluation, and the loop around them."""
