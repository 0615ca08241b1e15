"""What cards can do by their makers' documents: the table that turns a plan's FLOPs into hours.

Tensor throughput is dense, of bfloat16 products that are accumulated in float32, which is what training runs.
Data sheets print figures with sparsity, twice these; and of GeForce cards the figure for accumulation in
float16, which is twice as fast there (four times these together with sparsity). A row says where its figures
stand. Where a document gives none for a card, it is the documented rate of one multiprocessor times their
number times the boost clock, which gives what is printed for the cards of the same generation: 512 operations
a clock with float32 accumulation on GeForce cards of the Ampere, Ada and Blackwell generations.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from crd_fast.errors import UserError, did_you_mean

GIB = 1 << 30
LARGEST_GB = 1024  # of one card; a larger number is in another unit, or no size
GIGABYTES_A_LANE = {3: 0.985, 4: 1.969, 5: 3.938}  # a second, each way, of a PCI Express lane by generation
GEFORCE_RATE = 512  # FLOP a clock of one multiprocessor


@dataclass(frozen=True)
class Card:
    """One card. devices: what CUDA calls it; where two cards are called the same, memory tells them apart."""

    name: str
    tflops: float  # dense bfloat16 with float32 accumulation, at boost clock
    bandwidth: float  # of its memory, GB/s
    memory_gib: float
    pcie: tuple[int, int]  # generation and lanes of the host link
    devices: tuple[str, ...]
    source: str

    @property
    def memory(self) -> int:
        """Bytes."""
        return round(self.memory_gib * GIB)

    @property
    def link(self) -> float:
        """GB/s from the host, the bound of what is streamed."""
        generation, lanes = self.pcie
        return GIGABYTES_A_LANE[generation] * lanes

    def to_json(self) -> dict[str, object]:
        return {
            "name": self.name,
            "peak_tflops": self.tflops,
            "memory_gb_per_second": self.bandwidth,
            "memory_bytes": self.memory,
            "link_gb_per_second": self.link,
            "source": self.source,
        }


def _geforce(multiprocessors: int, boost_mhz: float) -> float:
    return round(multiprocessors * GEFORCE_RATE * boost_mhz * 1e-6, 1)


def _gib(mebibytes: int) -> float:
    """From what the driver shows, which is less than a card is sold with if error correction takes a part."""
    return mebibytes / 1024


SHOWN = "memory: nvidia-smi, as github.com/modal-labs/modal-client/pull/2797 lists it"
GA102 = "NVIDIA Ampere GA102 GPU Architecture, V2.0"
ADA = "NVIDIA Ada GPU Architecture, V2.01"
BLACKWELL = "NVIDIA RTX Blackwell GPU Architecture, V1.1"
RATE = "rate of a multiprocessor in {}; multiprocessors, boost clock and memory: NVIDIA's page of the card"

CARDS = (
    Card("rtx-3060", _geforce(28, 1777), 360, 12, (4, 16), ("GeForce RTX 3060",), RATE.format(GA102)),
    Card("rtx-3080", 59.5, 760, 10, (4, 16), ("GeForce RTX 3080",), GA102),
    Card("rtx-3090", 71.0, 936, 24, (4, 16), ("GeForce RTX 3090",), GA102),
    Card("rtx-4060", _geforce(24, 2460), 272, 8, (4, 8), ("GeForce RTX 4060",), RATE.format(ADA)),
    Card("rtx-4060-ti-16gb", _geforce(34, 2535), 288, 16, (4, 8), ("GeForce RTX 4060 Ti",), RATE.format(ADA)),
    Card("rtx-4070", _geforce(46, 2475), 504, 12, (4, 16), ("GeForce RTX 4070",), RATE.format(ADA)),
    Card(
        "rtx-4070-ti-super",
        *(_geforce(66, 2610), 672, 16, (4, 16), ("GeForce RTX 4070 Ti SUPER",), RATE.format(ADA)),
    ),
    Card("rtx-4080", 97.5, 716.8, 16, (4, 16), ("GeForce RTX 4080",), ADA),
    Card("rtx-4090", 165.2, 1008, 24, (4, 16), ("GeForce RTX 4090",), ADA),
    Card("rtx-5080", 112.6, 960, 16, (5, 16), ("GeForce RTX 5080",), BLACKWELL),
    Card("rtx-5090", 209.5, 1792, 32, (5, 16), ("GeForce RTX 5090",), BLACKWELL),
    Card("rtx-a6000", 154.8, 768, 48, (4, 16), ("RTX A6000",), GA102),
    Card(
        "rtx-6000-ada",
        *(364.2, 960, 48, (4, 16), ("RTX 6000 Ada Generation",)),
        "NVIDIA RTX 6000 Ada Generation data sheet (a quarter of its figure for FP8 with sparsity)",
    ),
    Card(
        "l4",
        *(121.0, 300, _gib(23034), (4, 16), ("L4",)),
        f"NVIDIA L4 data sheet (half of its figure with sparsity); {SHOWN}",
    ),
    Card("l40s", 362.05, 864, _gib(46068), (4, 16), ("L40S",), f"NVIDIA L40S data sheet; {SHOWN}"),
    Card("a10", 125.0, 600, _gib(23028), (4, 16), ("A10",), f"NVIDIA A10 data sheet; {SHOWN}"),
    Card(
        "a100-40gb",
        *(312.0, 1555, 40, (4, 16), ("A100-SXM4-40GB", "A100-PCIE-40GB")),
        "NVIDIA A100 data sheet",
    ),
    Card("a100-80gb", 312.0, 2039, 80, (4, 16), ("A100-SXM4-80GB",), "NVIDIA A100 data sheet"),
    Card("a100-pcie-80gb", 312.0, 1935, 80, (4, 16), ("A100 80GB PCIe",), "NVIDIA A100 data sheet"),
    Card(
        "h100",
        *(989.4, 3350, _gib(81559), (5, 16), ("H100 80GB HBM3",)),
        f"NVIDIA H100 data sheet (half of its figure with sparsity); {SHOWN}",
    ),
    Card(
        "h100-pcie",
        *(756.0, 2000, _gib(81559), (5, 16), ("H100 PCIe",)),
        f"NVIDIA H100 data sheet (half of its figure with sparsity); {SHOWN}",
    ),
    Card(
        "h200",
        *(989.4, 4800, 140, (5, 16), ("H200",)),
        "NVIDIA H200 data sheet (half of its figure with sparsity; 141 GB, of which CUDA shows 140 GiB)",
    ),
)
BY_NAME = {card.name: card for card in CARDS}


def parse_gpu(text: str) -> tuple[int, Card | None]:
    """Bytes of memory, and the card where `text` names one: `rtx-4090`, `RTX 4090`, or a size like `24GB`.

    Raises UserError that suggests the nearest names.
    """
    if card := _by_spelling(text):
        return card.memory, card
    try:
        return parse_memory(text), None
    except UserError:
        hint = did_you_mean(text.lower(), BY_NAME)
        raise UserError(
            f"--gpu: expected a size like 24GB or a card's name, got {text!r}{hint}; "
            f"known: {', '.join(BY_NAME)}"
        ) from None


def parse_memory(text: str) -> int:
    """Bytes of `24GB` or `24GiB`: both are 24 * 2^30, as cards are sold. Raises UserError, also where so much
    is on no card: a number in MiB, or a card's."""
    match = re.fullmatch(r"\s*(\d{1,9}(?:\.\d+)?)\s*(?:GB|GiB|G)?\s*", text, re.IGNORECASE)
    if not match or not float(match[1]):
        raise UserError(f"GPU memory: expected a size like 24GB, got {text!r}")
    if float(match[1]) > LARGEST_GB:
        raise UserError(f"GPU memory: expected a size in GB, like 24GB, at most {LARGEST_GB}, got {text!r}")
    return round(float(match[1]) * GIB)


def names_with(memory: int) -> list[str]:
    """Cards with as much memory, to be named in place of a size."""
    return [card.name for card in CARDS if card.memory == memory]


def card_of_device(device: str, memory: int) -> Card | None:
    """The card that CUDA calls `device` and that shows `memory` bytes; None where the table has none."""
    for card in CARDS:
        called = device.removeprefix("NVIDIA ") in card.devices
        if called and abs(memory / card.memory - 1) < 0.1:  # some of it is the driver's, or holds checksums
            return card
    return None


def _by_spelling(text: str) -> Card | None:
    """Whatever stands between letters and digits, and with the maker's name and the series or without."""
    wanted = _plain(text).removeprefix("nvidia").removeprefix("geforce").removeprefix("rtx")
    return next((card for card in CARDS if _plain(card.name).removeprefix("rtx") == wanted), None)


def _plain(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.lower())
