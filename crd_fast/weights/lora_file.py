"""Where a LoRA is, found without what reads it."""

from __future__ import annotations

from pathlib import Path

from crd_fast.errors import UserError
from crd_fast.weights.checkpoint import is_checkpoint


def lora_file(path: Path) -> Path:
    """The file itself, or the only one of a folder, as diffusers saves it; of a checkpoint its own.

    Raises UserError for neither.
    """
    if is_checkpoint(path):
        path = path / "diffusers"
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        if len(files) != 1:
            raise UserError(
                f"LoRA {path}: expected a file, or a folder with one .safetensors file, got {len(files)}"
            )
        return files[0]
    if not path.is_file():
        raise UserError(f"LoRA {path}: no such file")
    return path
