"""Where prompts come from: files, lists and categories, and the built-in worlds with their pictures."""
