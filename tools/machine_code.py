"""Reads a compiled Triton kernel: registers, spills, atomics, shared memory, occupancy, widths of accesses.

NVIDIA: from the cubin, with the cuobjdump and nvdisasm that ship with triton. AMD: from the assembly that the
binary was made of.
"""

import functools
import re
import subprocess
import tempfile
from collections import Counter

from triton import knobs

# Per multiprocessor: registers, threads, blocks, bytes of shared memory. CUDA C++ Programming Guide, table
# "Technical Specifications per Compute Capability".
NVIDIA = {
    "sm_80": (65536, 2048, 32, 164 * 1024),
    "sm_86": (65536, 1536, 16, 100 * 1024),
    "sm_89": (65536, 1536, 24, 100 * 1024),
    "sm_90": (65536, 2048, 32, 228 * 1024),
    "sm_100": (65536, 2048, 32, 228 * 1024),
    "sm_120": (65536, 1536, 24, 100 * 1024),
}
RESERVED_SHARED = 1024  # bytes that the system takes of every block's shared memory
# Per SIMD: vector registers of a lane, waves. Per compute unit: SIMDs, bytes of LDS. CDNA 3 ISA guide.
AMD = {"gfx942": (512, 8, 4, 64 * 1024)}

NVIDIA_ACCESS = re.compile(r"\b(LDG|STG)((?:\.\w+)*) ")
NVIDIA_WIDTH = re.compile(r"\.[US]?(8|16|64|128|256)(?![^.])")
NVIDIA_ATOMIC = re.compile(r"\b(?:ATOM[GS]?|RED)\b")  # REDUX, within a warp, is none
NVIDIA_SPILL = re.compile(r"\b(?:LDL|STL)\b")
AMD_ACCESS = re.compile(r"^\s*(?:global|buffer|flat)_(load|store)_(\w+)", re.MULTILINE)
AMD_ATOMIC = re.compile(r"^\s*(?:(?:global|buffer|flat)_atomic|ds_add|ds_cmpst)_", re.MULTILINE)
AMD_BITS = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32}


def inspect(kernel, target):
    """kernel: a triton CompiledKernel. Returns a dict; loads and stores map bits to instructions."""
    if "cubin" in kernel.asm:
        return _nvidia(kernel, target)
    return _amd(kernel, target)


def wide_bytes(accesses):
    """Bytes a thread moves in accesses of at least 128 bits."""
    return sum(int(bits) // 8 * count for bits, count in accesses.items() if int(bits) >= 128)


def write(kernel, folder, label):
    """PTX and cubin, or assembly and code object."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind in ("ptx", "cubin", "amdgcn", "hsaco"):
        if kind in kernel.asm:
            content = kernel.asm[kind]
            content = content.encode() if isinstance(content, str) else content
            (folder / f"{label}.{kind}").write_bytes(content)
    if "cubin" in kernel.asm:
        (folder / f"{label}.sass").write_text(_tool("nvdisasm", kernel.asm["cubin"]))


@functools.cache  # one kernel is read and written, and cases share some
def _tool(name, cubin, *options):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [getattr(knobs.nvidia, name).path, *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def nvidia_accesses(code):
    """Pairs (LDG or STG, bits) of SASS; an access without a width suffix has 32."""
    for kind, suffixes in NVIDIA_ACCESS.findall(code):
        width = NVIDIA_WIDTH.search(suffixes)
        yield kind, int(width.group(1)) if width else 32


def _nvidia(kernel, target):
    usage = _tool("cuobjdump", kernel.asm["cubin"], "-res-usage")
    registers, stack, local = (
        int(re.search(rf"{field}:(\d+)", usage).group(1)) for field in ("REG", "STACK", "LOCAL")
    )
    code = _tool("nvdisasm", kernel.asm["cubin"])
    loads, stores = Counter(), Counter()
    for kind, bits in nvidia_accesses(code):
        (loads if kind == "LDG" else stores)[bits] += 1
    threads, shared = kernel.metadata.num_warps * 32, kernel.metadata.shared
    file, most_threads, most_blocks, most_shared = NVIDIA[target]
    per_warp = -(-registers * 32 // 256) * 256  # registers are handed out in units of 256 a warp
    blocks = min(
        file // (per_warp * kernel.metadata.num_warps),
        most_threads // threads,
        most_blocks,
        most_shared // (shared + RESERVED_SHARED),
    )
    return {
        "threads": threads,
        "registers": registers,
        "atomics": len(NVIDIA_ATOMIC.findall(code)),
        "spills": len(NVIDIA_SPILL.findall(code)) + (stack + local > 0),
        "shared": shared,
        "occupancy": blocks * threads / most_threads,
        "loads": dict(sorted(loads.items(), reverse=True)),
        "stores": dict(sorted(stores.items(), reverse=True)),
    }


def _amd(kernel, target):
    code = kernel.asm["amdgcn"]

    def field(name):
        return int(re.search(rf"\.{name}:\s+(\d+)", code).group(1))

    loads, stores = Counter(), Counter()
    for kind, width in AMD_ACCESS.findall(code):
        bits = AMD_BITS.get(width, 8 if "byte" in width else 16)
        (loads if kind == "load" else stores)[bits] += 1
    threads, shared = kernel.metadata.num_warps * 64, kernel.metadata.shared
    registers = field("vgpr_count")
    file, most_waves, simds, most_shared = AMD[target]
    waves = min(most_waves, file // (-(-registers // 8) * 8))
    blocks = waves * simds // kernel.metadata.num_warps
    if shared:
        blocks = min(blocks, most_shared // shared)
    return {
        "threads": threads,
        "registers": registers,
        "atomics": len(AMD_ATOMIC.findall(code)),
        "spills": field("vgpr_spill_count") + field("sgpr_spill_count"),
        "shared": shared,
        "occupancy": blocks * kernel.metadata.num_warps / (most_waves * simds),
        "loads": dict(sorted(loads.items(), reverse=True)),
        "stores": dict(sorted(stores.items(), reverse=True)),
    }
