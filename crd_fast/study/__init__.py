"""Studies: the arms of a question, each over several seeds, by the trainer as it is."""
