"""What a recipe takes, said before anything is loaded."""
