"""Where prompts come from: files, lists and categories, and the built-in worlds with their pictures."""

from crd_fast.prompts.source import PromptSource, read_prompts

__all__ = ["PromptSource", "read_prompts"]
