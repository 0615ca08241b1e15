"""The policy and what is kept beside it: snapshots, reference, optimizer, checkpoints."""
