"""The commands, each a function that reads its options and calls what does the work."""
