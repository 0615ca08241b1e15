"""What `crd-fast doctor` finds of the machine: disk, memory, GPUs, as other machines have them."""

import shutil
import tempfile
import types
from collections import namedtuple

import pytest
import torch

from crd_fast.doctor import machine
from crd_fast.doctor.check import Check, pip_install


def refuse(*arguments, **options):
    raise PermissionError(13, "Permission denied")


def test_folder_that_cannot_be_written_to(monkeypatch):
    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    check = machine.write_access()
    assert check.status == "missing" and "Permission denied" in check.found and "--output" in check.note


@pytest.mark.parametrize(("free", "status"), [(0.1, "missing"), (2.0, "warning"), (50.0, "ok")])
def test_disk(monkeypatch, free, status):
    usage = namedtuple("Usage", "free")(free * 2**30)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert machine.disk().status == status


def fake_torch(hip=None, **properties):
    values = {
        "name": "Example GPU",
        "total_memory": 24 * 2**30,
        "major": 8,
        "minor": 9,
        "gcnArchName": "gfx942",
    }
    cuda = types.SimpleNamespace(
        is_available=lambda: True,
        device_count=lambda: 2,
        get_device_properties=lambda index: types.SimpleNamespace(**values | properties),
    )
    return types.SimpleNamespace(
        cuda=cuda, version=types.SimpleNamespace(hip=hip, cuda=None if hip else "13.0")
    )


def test_memory_of_a_container_is_what_its_processes_leave(monkeypatch):
    """Files that it has read are dropped where the memory is wanted."""
    group, gib = "/sys/fs/cgroup/memory", 2**30
    files = {
        f"{group}.max": f"{8 * gib}\n",
        f"{group}.current": f"{6 * gib}\n",
        f"{group}.stat": f"anon {5 * gib}\ninactive_file {gib}\n",
        "/proc/meminfo": f"MemTotal: 1 kB\nMemAvailable:   {20 * 2**20} kB\n",
    }
    monkeypatch.setattr(machine.os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 2**23}.get)
    monkeypatch.setattr(machine, "_read", lambda path: files.get(path, ""))
    assert machine.memory().found == "8.0 GiB, 3.0 GiB free" and machine.memory().status == "warning"
    files[f"{group}.max"] = "max\n"
    assert machine.memory().found == "32.0 GiB, 20.0 GiB free" and machine.memory().status == "ok"


def test_gpus(monkeypatch):
    monkeypatch.setattr(machine, "attempt", lambda module: (fake_torch(), ""))
    found = [check.found for check in machine.gpus()]
    assert found == ["Example GPU, 24.0 GiB, CUDA 13.0, compute capability 8.9"] * 2
    monkeypatch.setattr(machine, "attempt", lambda module: (fake_torch(hip="7.1"), ""))
    assert machine.gpus()[1] == Check("GPU 1", "ok", "Example GPU, 24.0 GiB, ROCm 7.1, gfx942")


def test_gpu_that_torch_cannot_use(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/nvidia-smi" if name == "nvidia-smi" else None)
    (check,) = machine.gpus()
    assert check.status == "warning" and check.note == pip_install("--force-reinstall", "torch")
