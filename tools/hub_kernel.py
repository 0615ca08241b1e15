"""`crd_kernels` as Hugging Face's hub holds kernels: `python -m tools.hub_kernel FOLDER`.

Writes what kernel-builder builds from kernels/build.toml: in FOLDER/build the card, and for each backend a
variant with the package's files, its metadata and every file's digest. All variants hold the same files:
Triton and the system's C++ compiler build for the machine at hand. `kernels.get_local_kernel(Path(FOLDER))`
loads it, `kernel-builder upload FOLDER --repo-id OWNER/crd-kernels` publishes it.

The id, under which a process imports a variant and registers its operators, covers the content: builds of two
commits run side by side.
"""

import argparse
import base64
import hashlib
import json
import shutil
import tomllib
from pathlib import Path

KERNELS = Path(__file__).parent.parent / "kernels"


def write(folder: Path, source: Path = KERNELS) -> list[Path]:
    """The variants written to folder/build, which must not exist yet."""
    build = tomllib.loads((source / "build.toml").read_text())
    general, endings = build["general"], tuple(f".{ending}" for ending in build["torch-noarch"]["pyext"])
    name = general["name"].replace("-", "_")
    files = sorted(path for path in (source / name).rglob("*") if path.name.endswith(endings))
    content = {path.relative_to(source / name).as_posix(): path.read_bytes() for path in files}
    unique = _sha256(repr(content).encode()).hex()[:10]
    digest = {path: base64.b64encode(_sha256(data)).decode() for path, data in content.items()}

    (folder / "build").mkdir(parents=True)
    shutil.copy(source / "build.toml", folder)
    shutil.copy(source / "README.md", folder / "build" / "CARD.md")
    variants = []
    for backend in general["backends"]:
        variant = folder / "build" / f"torch-{backend}"
        for path, data in content.items():
            (variant / path).parent.mkdir(parents=True, exist_ok=True)
            (variant / path).write_bytes(data)
        metadata = {
            "name": general["name"],
            "id": f"_{name}_{backend}_{unique}",
            "version": general["version"],
            "license": general["license"],
            "python-depends": [],
            "kernel-depends": [],
            "backend": {"type": backend},
            "digest": {"algorithm": "sha256", "files": digest},
        }
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
        variants.append(variant)
    return variants


def _sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.hub_kernel")
    parser.add_argument("folder", type=Path)
    for variant in write(parser.parse_args().folder):
        print(variant)


if __name__ == "__main__":
    main()
