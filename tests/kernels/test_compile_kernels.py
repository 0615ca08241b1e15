"""The kernels compiled for GPUs that are not here: one NVIDIA and one AMD target, and what is a failure."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_compiles_without_spills_and_with_wide_accesses(tmp_path, target):
    if target == "gfx942" and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9):
        pytest.skip("Triton before 3.9 spills six registers of one kernel there")
    result, dump = tmp_path / "kernels.json", tmp_path / "dump"
    options = ["--targets", target, "--ends", "--json", str(result), "--dump", str(dump)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "tools.compile_kernels", *options],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-5000:]
    reports = json.loads(result.read_text())["kernels"]
    published = {
        "dtype": "bf16",
        "reference": "guided",
        "noise": "given",
        "layout": "contiguous",
        "op": "loss",
        "method": "crd",
        "settings": "",
        "mask": "",
    }
    passes = {r["kernel"]: r for r in reports if published.items() <= r.items()}
    measure, gradient = passes["measure_kernel"], passes["gradient_kernel"]
    assert (measure["wide_reads"], measure["wide_writes"]) == (6, 0)
    assert (gradient["wide_reads"], gradient["wide_writes"]) == (5, 1)
    assert not any(r["spills"] or r["atomics"] for r in reports)
    assert {r["launches"] for r in reports if r["op"] == "loss"} == {3}
    nft = {"method": "nft", "dtype": "bf16", "layout": "contiguous"}
    nft = {r["kernel"]: r for r in reports if nft.items() <= r.items()}
    assert nft["measure_kernel"]["wide_reads"] == nft["gradient_kernel"]["wide_reads"] == 4
    assert len(list((dump / target).iterdir())) >= 2 * len({r["kernel"] for r in reports})


@pytest.mark.slow
def test_narrow_loads_end_in_a_failure():
    """One element to a thread cannot be loaded 128 bits wide: the command says so and exits with 1."""
    code = (
        "import sys; from tools import compile_kernels as tool;"
        "case = tool.Case('loss', 'bf16'); tool.cases = lambda every: iter([case]);"
        "tool.launch.options = lambda dtype: {'num_warps': 32};"
        "sys.exit(tool.main(['--targets', 'sm_90']))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 1, run.stdout[-5000:] + run.stderr[-5000:]
    assert "6 reads are 128 bits wide" in run.stdout


def test_problems_are_seen():
    from tools.compile_kernels import Case, problems

    good = {"kernel": "measure_kernel", "launches": 3, "spills": 0, "atomics": 0}
    good |= {"wide_reads": 6.0, "wide_writes": 0.0}
    case = Case("loss", "bf16")
    assert problems(case, good | {"launches": 4}) == ["4 launches instead of 3"]
    assert not problems(case, good)
    assert problems(case, good | {"spills": 3}) == ["3 spills"]
    assert problems(case, good | {"atomics": 1}) == ["1 atomics"]
    assert problems(case, good | {"wide_reads": 5.0}) == ["5 of 6 reads are 128 bits wide"]
    odd = dataclasses.replace(case, layout="odd")
    assert not problems(odd, good | {"wide_reads": 0.0})


def test_widths_are_read_off_the_instructions():
    from tools.machine_code import AMD_ACCESS, AMD_ATOMIC, NVIDIA_ATOMIC, nvidia_accesses, wide_bytes

    code = """
        @P0 LDG.E.128 R24, [R10.64] ;
        LDG.E.LTC128B.128.CONSTANT R4, desc[UR6][R6.64] ;
        LDG.E.U16 R2, [R4.64] ;
        LDG.E R2, [R4.64] ;
        @!P1 STG.E.EF.64 desc[UR6][R2.64], R15 ;
    """
    accesses = list(nvidia_accesses(code))
    assert accesses == [("LDG", 128), ("LDG", 128), ("LDG", 16), ("LDG", 32), ("STG", 64)]
    amd = "\tglobal_load_dwordx4 v[0:3], v0\n\tbuffer_store_short v1, v2\n\ts_load_dword s0\n"
    assert AMD_ACCESS.findall(amd) == [("load", "dwordx4"), ("store", "short")]
    assert len(NVIDIA_ATOMIC.findall("RED.E.ADD [R2], R3 ; ATOMG.E.CAS R1 ; REDUX.SUM UR4, R2 ;")) == 2
    assert len(AMD_ATOMIC.findall("\tglobal_atomic_add_f32 v0, v1\n\tglobal_load_dword v0\n")) == 1
    assert wide_bytes({256: 1, 128: 2, 64: 5}) == 64
