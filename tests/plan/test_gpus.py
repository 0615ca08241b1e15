"""Cards by name, and what stands in their rows."""

import pytest

from crd_fast.errors import UserError
from crd_fast.plan.gpus import BY_NAME, CARDS, GIB, card_of_device, names_with, parse_gpu, parse_memory


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_names_resolve(card):
    assert parse_gpu(card.name) == (card.memory, card)
    assert parse_gpu(card.name.replace("-", " ").upper()) == (card.memory, card)
    assert parse_gpu(card.name.replace("-", "")) == (card.memory, card)
    for device in card.devices:
        assert card_of_device(f"NVIDIA {device}", card.memory * 97 // 100) is card
    assert card.source and card.memory > 0 and card.link > 10


def test_sizes_still_work():
    assert parse_gpu("24GB") == parse_gpu(" 24 GiB") == (24 * GIB, None)
    assert parse_gpu("1024GB")[0] == 1024 * GIB
    assert names_with(12 * GIB) == ["rtx-3060", "rtx-4070"]


def test_a_number_is_a_cards_or_a_size_that_there_is():
    assert parse_gpu("4090") == parse_gpu("RTX4090") == parse_gpu("rtx-4090")
    for text in ("24576", "24564MiB", "4091"):
        with pytest.raises(UserError, match="expected a size like 24GB or a card's name"):
            parse_gpu(text)
    with pytest.raises(UserError, match="expected a size in GB, like 24GB, at most 1024, got '24576'"):
        parse_memory("24576")


@pytest.mark.parametrize("name, sold", [("l4", 24), ("a10", 24), ("l40s", 48), ("h100", 80)])
def test_memory_is_what_a_card_shows_and_not_what_it_is_sold_with(name, sold):
    """A sixteenth of GDDR6 that corrects its errors is for that."""
    share = BY_NAME[name].memory / (sold * GIB)
    assert share == pytest.approx(15 / 16, abs=0.001) if name != "h100" else 0.99 < share < 1


@pytest.mark.parametrize(
    "typo, meant",
    [("rtx-409", "rtx-4090"), ("rtx4O90", "rtx-4090"), ("a100-80", "a100-80gb"), ("h10", "h100")],
)
def test_a_typo_is_told_the_nearest_name(typo, meant):
    with pytest.raises(UserError, match=f"did you mean '{meant}'") as error:
        parse_gpu(typo)
    assert "size like 24GB" in str(error.value) and "\n" not in str(error.value)


def test_devices_that_only_sound_alike_are_none():
    """Their throughput is another."""
    alike = (
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA A10G",
        "Tesla T4",
    )
    for device in alike:
        assert card_of_device(device, 24 * GIB) is None
    assert card_of_device("NVIDIA GeForce RTX 3060", 8 * GIB) is None  # sold with less memory, and slower
    assert card_of_device("NVIDIA GeForce RTX 4060 Ti", 8 * GIB) is None


# of cards whose throughput stands in a document: it confirms the rate that other rows are derived from, and
# that no row has a figure with sparsity or with float16 accumulation
@pytest.mark.parametrize(
    "name, multiprocessors, boost_mhz, rate",
    [
        ("rtx-3080", 68, 1710, 512),
        ("rtx-3090", 82, 1695, 512),
        ("rtx-4080", 76, 2505, 512),
        ("rtx-4090", 128, 2520, 512),
        ("rtx-5080", 84, 2617, 512),
        ("rtx-5090", 170, 2407, 512),
        ("rtx-a6000", 84, 1800, 1024),
        ("rtx-6000-ada", 142, 2505, 1024),
        ("a10", 72, 1695, 1024),
        ("l4", 58, 2040, 1024),
        ("a100-80gb", 108, 1410, 2048),
        ("h100", 132, 1830, 4096),
        ("h100-pcie", 114, 1620, 4096),
    ],
)
def test_throughput_follows_from_clock_and_rate(name, multiprocessors, boost_mhz, rate):
    assert BY_NAME[name].tflops == pytest.approx(multiprocessors * boost_mhz * rate * 1e-6, rel=0.01)
