"""The doctor: what it says about machines that lack something, each faked in the smallest way."""

import io
import shutil
import subprocess
import sys
import threading
from collections import namedtuple
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from crd_fast import doctor
from crd_fast.config import load_recipe, recipes_by_model
from crd_fast.doctor import hub, machine, packages
from crd_fast.doctor.check import Check, pip_install
from crd_fast.doctor.outlook import LARGEST_FIRST, Gpu, outlook, recipes_for
from crd_fast.worlds import FILES


def rendered(monkeypatch, found, model=None):
    """Exit code and text of `render` when `checks` finds `found`."""
    monkeypatch.setattr(doctor, "checks", lambda: found)
    console = Console(width=200, record=True, file=io.StringIO())
    return doctor.render(console, model), console.export_text()


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder of installed packages: `site("name", "1.0", "source of __init__.py")`."""
    folder = tmp_path / "site"

    def install(name, version, source):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(source)
        information = folder / f"{name}-{version}.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")

    monkeypatch.syspath_prepend(folder)
    return install


def test_this_machine():
    """Whatever is installed here, the tests run: the packages are found, each check says something."""
    found = {check.name: check for check in doctor.checks()}
    assert {"python", "CPU", "memory", "torch", "triton", "C++ compiler", "bitsandbytes", "disk"} <= set(
        found
    )
    assert all(check.found and check.status in doctor.MARKS for check in found.values())
    assert all(check.note for check in found.values() if check.status != "ok")
    for name in ("python", "torch", "diffusers", "transformers", "peft", "current folder"):
        assert found[name].status == "ok", found[name]
    assert found["torch"].found == torch.__version__


def test_what_will_be_used_on_a_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CXX", sys.executable)
    used = doctor.choices()
    assert used["device"].startswith("CPU") and used["loss"] == "cpu (compiled C++)"
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert doctor.choices()["loss"] == "cpu (torch operations: no C++ compiler)"


def test_without_torch_it_says_how_to_get_it():
    """In a process of its own, in which torch cannot be imported at all."""
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from rich.console import Console; from crd_fast.doctor import render\n"
        "raise SystemExit(render(Console(width=300)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 2, result.stderr
    assert "Training cannot run here yet. Missing: torch" in result.stdout
    assert "-m pip install torch" in result.stdout


def test_exit_code_and_words(monkeypatch):
    monkeypatch.setattr(doctor, "choices", lambda: {"loss": "cpu"})
    fine, weak = Check("torch", "ok", "2.13"), Check("disk", "warning", "2 GiB free", "[brackets] stay")
    code, text = rendered(monkeypatch, [fine, weak])
    assert code == 0 and "Training can run here" in text and "loss      cpu" in text and "[brackets]" in text
    code, text = rendered(monkeypatch, [fine, Check("peft", "missing", "not installed", "pip install peft")])
    assert code == 2 and "Missing: peft." in text and "will use" not in text
    assert text.rstrip().endswith("One thing to do: pip install peft")


def test_broken_optional_package_is_a_warning(site, monkeypatch):
    site("flash_attn", "2.8.3", "raise RuntimeError('undefined\\nsymbol')")
    check = packages.flash_attention()
    assert check.status == "warning" and check.found == "2.8.3, broken"
    assert "RuntimeError: undefined symbol" in check.note and "pip install --force-reinstall" in check.note


def test_broken_bitsandbytes_is_a_warning_and_changes_the_choice(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    check = packages.bitsandbytes()
    assert check.status == "warning" and check.found.endswith("broken") and "bitsandbytes>=" in check.note
    assert doctor.choices()["optimizer"] == "adamw; adamw8bit needs bitsandbytes"


def test_old_and_absent_packages(monkeypatch):
    monkeypatch.setattr(packages, "installed", lambda name: "0.17.1")
    assert packages.package("peft") == Check("peft", "missing", "0.17.1", pip_install("-U", "peft>=0.18"))
    monkeypatch.setattr(packages, "installed", lambda name: "0.18")
    assert packages.package("peft").status == "ok"
    monkeypatch.setattr(packages, "installed", lambda name: None)
    assert packages.package("peft").note == pip_install("peft>=0.18")


def test_command_names_this_interpreter(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv" / "bin" / "python"))
    assert pip_install("peft>=0.18") == ".venv/bin/python -m pip install 'peft>=0.18'"


@pytest.mark.parametrize(
    ("damage", "status", "found"),
    [
        (None, "ok", "MB of weights"),
        (
            lambda path: path.write_bytes(path.read_bytes()[:-1]),
            "missing",
            "transformer.safetensors is damaged",
        ),
        (
            lambda path: path.write_bytes(path.read_bytes() + b"0"),
            "missing",
            "transformer.safetensors is damaged",
        ),
        (lambda path: path.write_bytes(b""), "missing", "transformer.safetensors is damaged"),
        (lambda path: path.unlink(), "missing", "no transformer.safetensors"),
    ],
    ids=["whole", "truncated", "too long", "empty", "absent"],
)
def test_builtin_weights(tmp_path, damage, status, found):
    for name in FILES[:2]:
        save_file({"a": torch.zeros(3), "b": torch.zeros(2, 5, dtype=torch.bfloat16)}, tmp_path / name)
    (tmp_path / "tokenizer.json").write_text("{}")
    if damage:
        damage(tmp_path / "transformer.safetensors")
    check = machine.builtin("builtin", tmp_path)
    assert check.status == status and found in check.found
    assert check.note.startswith("git checkout -- ") == (status == "missing")


def test_library_kernels(site, tmp_path, monkeypatch):
    """A folder `kernels` hides the installed library if it is a package, and not if it has no __init__.py."""
    monkeypatch.delitem(sys.modules, "kernels", raising=False)
    site("kernels", "0.12.0", "")
    here = tmp_path / "here"
    (here / "kernels").mkdir(parents=True)
    monkeypatch.syspath_prepend(here)
    assert packages.kernels_library() == Check("library `kernels`", "ok", "0.12.0")
    (here / "kernels" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(here)  # forgets what the import system had cached
    check = packages.kernels_library()
    assert check.status == "warning" and str(here) in check.found


def test_no_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/dnf" if name == "dnf" else None)
    check = packages.compiler()
    assert check.status == "warning" and check.note.endswith("sudo dnf install gcc-c++")


# --- what can be trained

OK = [Check("torch", "ok", "2.13")]


def card(gib, bfloat16=True):
    """A card of so many GiB, of which the device shows a little less."""
    return Gpu("Example GPU", round((gib - 0.4) * 2**30), bfloat16)


@pytest.fixture
def logged_in(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")


@pytest.mark.parametrize("gib", [8, 12, 16, 24, 32, 48, 80])
def test_what_is_offered_is_for_no_larger_card(logged_in, gib):
    names = [one.name for one in recipes_for(card(gib).gigabytes)]
    sizes = {int(name.rpartition("-")[2].removesuffix("gb")) for name in names}
    assert sizes == {max(size for size in (8, 12, 16, 24, 80) if size <= gib)}
    first = outlook(OK, card(gib))[0]
    recipe = load_recipe(names[0])
    assert first.startswith("You can train ") and first.endswith(f"crd-fast train {names[0]}")
    assert f"at {recipe.rollout.resolution} x {recipe.rollout.resolution} on Example GPU" in first
    assert not recipe.model.streaming and recipe.rollout.resolution >= 512


def test_every_model_that_recipes_ship_for_is_ranked():
    assert set(LARGEST_FIRST) == set(recipes_by_model())
    models = [one.model for one in recipes_for(80)]
    assert models == list(LARGEST_FIRST)  # all at one size there


def test_a_gated_model_wants_a_login(monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    lines = outlook(OK, card(12))
    assert "sd3.5-medium" in lines[0] and lines[1].endswith("stable-diffusion-3.5-medium, then hf auth login")
    assert hub.login().found == "none" and "hf auth login" in hub.login().note
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    assert not any("One thing" in line for line in outlook(OK, card(12)))
    assert "hf_of_a_test" not in str(hub.login())


class Hub(BaseHTTPRequestHandler):
    """What the hub answers when it is asked for access: a status, and the reason in a header."""

    answers: ClassVar = {
        "my/open": (200, ""),
        "my/gated": (403, "GatedRepo"),
        "my/none": (404, "RepoNotFound"),
    }

    def do_GET(self):
        name = self.path.removeprefix("/api/models/").removesuffix("/auth-check")
        status, code = self.answers.get(name, (500, ""))
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


def test_access_to_a_named_model(monkeypatch, tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setitem(Hub.answers, load_recipe("flux.1-dev-12gb").model.path, (403, "GatedRepo"))
    try:
        found = {name: hub.access(name) for name in ("my/open", "my/gated", "my/none", "my/odd")}
        found["flux"], found["here"] = hub.access("flux.1-dev"), hub.access(str(tmp_path))
    finally:
        server.shutdown()
        server.server_close()
    assert [check.status for check in found.values()] == [
        *("ok", "missing", "missing", "warning"),
        *("missing", "ok"),
    ]
    assert (
        found["my/gated"].note == "accept the licence at https://huggingface.co/my/gated, then hf auth login"
    )
    assert "black-forest-labs/FLUX.1-dev" in found["flux"].note
    assert hub.access("my/open").status == "warning"  # nobody answers any more
    wrong = hub.access("sd3.5-mediun")  # nor is anybody asked
    assert wrong.status == "missing" and "did you mean 'sd3.5-medium" in wrong.found
    assert hub.access("builtin").status == "ok"

    monkeypatch.setattr(doctor, "choices", lambda: {"loss": "cpu"})
    code, text = rendered(monkeypatch, [], model="sd3.5-mediun")  # not what this machine lacks
    assert code == 2 and "Training can run here, but not of sd3.5-mediun yet, and will use:" in text
    code, text = rendered(monkeypatch, [Check("peft", "missing", "none", "pip")], model="sd3.5-mediun")
    assert code == 2 and "Training cannot run here yet. Missing: peft." in text
    code, text = rendered(monkeypatch, [], model=str(tmp_path))
    assert code == 0 and f"a folder here, {tmp_path}" in text.replace("\n", "")


@pytest.mark.parametrize(
    ("gpu", "where", "why"),
    [
        (None, "on the CPU", "a GPU of 8 GB or more"),
        (card(6), "on Example GPU", "a GPU of 8 GB or more"),
        (card(24, bfloat16=False), "on Example GPU", "bfloat16, which this one lacks"),
    ],
)
def test_elsewhere_the_small_model_can_be_trained(gpu, where, why):
    first, second = outlook(OK, gpu)
    assert first == f"You can train builtin at 32 x 32 {where}, in minutes: crd-fast train" and why in second


def test_a_gpu_that_torch_cannot_use_is_the_one_thing_to_do():
    unusable = Check("GPU", "warning", "an NVIDIA driver, but torch cannot use it", "pip install torch")
    assert outlook([*OK, unusable], None) == ["One thing to do: pip install torch"]


def test_nothing_is_cut_at_80_columns(monkeypatch):
    note = pip_install("--force-reinstall", "--no-deps", "--no-build-isolation", "a-package-with-a-name>=1.0")
    monkeypatch.setattr(doctor, "checks", lambda: [Check("bitsandbytes", "warning", "broken", note)])
    console = Console(width=80, file=io.StringIO())
    doctor.render(console)
    assert any(line.strip() == note for line in console.file.getvalue().splitlines())


def test_extras(monkeypatch):
    versions = {"rapidocr": "3.10.0", "onnxruntime": "1.32.0"}
    monkeypatch.setattr(packages, "installed", versions.get)
    assert packages.extra("ocr") == Check("extra ocr", "ok", "rapidocr 3.10.0, onnxruntime 1.32.0")
    check = packages.extra("server")
    assert check.status == "ok" and "fastapi>=" in check.note and "uvicorn>=" in check.note
    versions["rapidocr"] = "3.9"
    check = packages.extra("ocr")
    assert check.status == "warning" and check.note == f"optional: {pip_install('rapidocr>=3.10')}"


def test_the_kernels_are_of_this_version(monkeypatch):
    assert packages.itself().status == "ok"
    monkeypatch.setattr(packages, "installed", {"crd-fast": "0.1.0", "crd-kernels": "0.0.9"}.get)
    check = packages.itself()
    assert check.status == "missing" and "crd-kernels 0.0.9" in check.found and "./kernels" in check.note


@pytest.mark.parametrize(("free", "status"), [(5, "warning"), (50, "ok")])
def test_the_disk_of_downloads(monkeypatch, tmp_path, free, status):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "not" / "yet"))
    asked = []
    usage = namedtuple("Usage", "free")(free * 2**30)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(path) or usage)
    check = hub.cache()
    assert check.status == status and str(tmp_path) in check.found and asked == [tmp_path]


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("echo 580.95.05", ("ok", "NVIDIA 580.95.05")),
        ("echo no devices were found; exit 9", ("warning", "nvidia-smi fails")),
    ],
)
def test_driver(monkeypatch, tmp_path, script, expected):
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\n{script}\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    (check,) = machine.driver()
    assert (check.status, check.found) == expected


def test_no_driver(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(machine, "_read", lambda path: "")
    assert machine.driver() == []
