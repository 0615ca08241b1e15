"""Two copies in one process, loaded by Hugging Face's own `kernels`, and what its hub wants of a package.

`kernels` is in a folder of its own (Makefile): where it can be imported, bitsandbytes asks the network for
kernels.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import crd_kernels
import pytest

from tools import hub_kernel

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "kernels"
LIBRARY = Path(sys.prefix) / "hub"
needs_library = pytest.mark.skipif(not LIBRARY.exists(), reason=f"needs `kernels` in {LIBRARY} (make env)")

COMPARE = """
import torch

def results(copy, compiled):
    torch.manual_seed(0)
    policy = torch.randn(4, 3, 8, 8, requires_grad=True)
    old, reference, x0, noise = torch.randn(4, 4, 3, 8, 8)
    others = old, reference, x0, noise, torch.randn(4), torch.zeros(4, dtype=torch.long)
    loss = lambda policy: copy.crd_loss(policy, *others).loss
    value = (torch.compile(loss, backend="aot_eager", fullgraph=True) if compiled else loss)(policy)
    value.backward()
    return value.detach(), policy.grad

def operators(namespace):
    names = (schema.name.partition("::") for schema in torch._C._jit_get_all_schemas())
    return {operator for owner, _, operator in names if owner == namespace}

copies = {"crd_kernels": crd_kernels, source.__name__: source, one.__name__: one,
          "_crd_kernels_regenerated": two, "trainer_third_party_crd_kernels": inside}
assert len({id(copy.crd_loss) for copy in copies.values()}) == len(copies) == 5
wanted = results(crd_kernels, False)
assert wanted[1].abs().sum() > 0
for namespace, copy in copies.items():
    assert operators(namespace) == operators("crd_kernels") > {"measure"}, namespace
    for compiled in (False, True):
        assert all(map(torch.equal, results(copy, compiled), wanted)), (namespace, compiled)
assert not operators(two.__name__)
"""


def run(code):
    """Prints of `code`, which can import Hugging Face's library and never asks the hub."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(LIBRARY)}
    command = [sys.executable, "-W", "error::RuntimeWarning", "-c", code]
    ended = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@needs_library
@pytest.mark.slow
def test_copies_compute_side_by_side(tmp_path):
    """Installed, loaded from the source, from two builds of different content, and inside another package.

    The second build has kernel-builder's kind of _ops.py: a namespace that is not the module's name.
    """
    changed, inside = tmp_path / "changed", tmp_path / "trainer" / "third_party" / "crd_kernels"
    shutil.copytree(SOURCE, changed, ignore=shutil.ignore_patterns("__pycache__"))
    (changed / "crd_kernels" / "_ops.py").write_text(
        "import torch\n"
        "ops = torch.ops._crd_kernels_regenerated\n"
        "def add_op_namespace_prefix(op_name):\n"
        "    return f'_crd_kernels_regenerated::{op_name}'\n"
    )
    hub_kernel.write(tmp_path / "one")
    hub_kernel.write(tmp_path / "two", changed)
    shutil.copytree(SOURCE / "crd_kernels", inside)
    run(
        "import sys, crd_kernels\n"
        "from pathlib import Path\n"
        "from kernels import get_local_kernel\n"
        f"folder = Path({str(tmp_path)!r})\n"
        "sys.path.append(str(folder))\n"
        "import trainer.third_party.crd_kernels as inside\n"
        f"source = get_local_kernel(Path({str(SOURCE)!r}))\n"
        "one, two = (get_local_kernel(folder / name) for name in ('one', 'two'))\n" + COMPARE
    )


def test_no_module_spells_the_namespace_or_imports_by_the_packages_own_name():
    spelled = re.compile(
        r"crd_kernels::|torch\.ops\.crd_kernels|^\s*(from|import) crd_kernels\b", re.MULTILINE
    )
    for path in (SOURCE / "crd_kernels").rglob("*.py"):
        assert not spelled.search(path.read_text()), path


@needs_library
def test_the_hubs_own_library_reads_what_we_wrote(tmp_path):
    """build.toml as kernel-builder reads it; metadata, variants and digests as `kernels` checks them."""
    variants = hub_kernel.write(tmp_path / "hub")
    assert [variant.name for variant in variants] == ["torch-cpu", "torch-cuda", "torch-rocm"]
    said = run(
        "from pathlib import Path\n"
        "from kernels._rust import Build, Digest, DigestAlgorithm, Metadata\n"
        f"print(Build.open(Path({str(SOURCE)!r})).general)\n"
        f"print(Metadata.read_from_file(Path({str(SOURCE / 'metadata.json')!r})).id)\n"
        f"for variant in map(Path, {list(map(str, variants))!r}):\n"
        "    metadata = Metadata.read_from_file(variant / 'metadata.json')\n"
        "    metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, variant))\n"
        "    print(metadata.id.isidentifier(), metadata.backend.backend_type, metadata.license)\n"
    )
    assert said.splitlines() == [
        "General(backends=[Cpu, Cuda, Rocm])",
        "_crd_kernels_" + crd_kernels.__version__.replace(".", "_"),
        *(f"True {backend} apache-2.0" for backend in ("cpu", "cuda", "rocm")),
    ]


def test_the_build_has_every_file_of_the_package(tmp_path):
    (variant, *_) = hub_kernel.write(tmp_path / "hub")
    files = {path.relative_to(SOURCE / "crd_kernels") for path in (SOURCE / "crd_kernels").rglob("*.*")}
    built = {path.relative_to(variant) for path in variant.rglob("*.*")}
    assert {path for path in files if path.suffix != ".pyc"} == built - {Path("metadata.json")}


def test_the_card_says_library_and_license():
    assert (SOURCE / "README.md").read_text().startswith("---\nlibrary_name: kernels\nlicense: apache-2.0\n")
