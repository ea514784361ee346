"""Cards by name and sizes: what a process can have of them."""

import pytest

from fastrl.errors import InputError
from fastrl.memory.cards import CARDS, GIB, card_of, limit_of, memory_of


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("24GiB", 24 * GIB), ("24gib", 24 * GIB), ("24g", 24 * GIB), ("22.5G", int(22.5 * GIB)),
        ("24GB", 24 * 10**9), ("24 GB", 24 * 10**9), ("8192MiB", 8 * GIB), ("500MB", 500 * 10**6),
        ("512m", GIB // 2),
    ],
)  # fmt: skip
def test_sizes_are_binary_where_they_say_so(text, num_bytes):
    assert memory_of(text) == num_bytes


@pytest.mark.parametrize(
    "text", ["rtx4090", "RTX 4090", "4090", "rtx-4090", "NVIDIA GeForce RTX 4090"]
)
def test_a_card_by_any_way_of_writing_it(text):
    # 23.52 GiB: "GPU 0 has a total capacity of 23.52 GiB", of a 4090
    assert memory_of(text) == int(23.52 * GIB)


def test_cards_with_several_sizes_are_told_apart():
    assert memory_of("A100 80GB") > memory_of("a100-40") > 39 * GIB
    with pytest.raises(InputError, match="several sizes; give rtx4060ti-8 or rtx4060ti-16"):
        memory_of("4060 Ti")


def test_a_driver_leaves_less_than_the_nominal_size_but_not_much():
    for name, card in CARDS.items():
        assert 0.9 * card.nominal < card.usable < card.nominal, name
        assert card_of(name, "--gpu") is card


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rtx4091", "got 'rtx4091'; the nearest are rtx4090"),
        ("banana", "no known name is close"),
        ("24", "must be a card, such as rtx4090, or a size, such as 24GiB, got '24'"),
        ("24XB", "such as 24GiB, got '24XB'"),
        ("0GiB", "must be more than nothing"),
        ("-8GiB", "such as 24GiB, got '-8GiB'"),
        ("", "got ''"),
    ],
)
def test_what_is_neither_is_refused_in_one_line(text, message):
    with pytest.raises(InputError) as error:
        memory_of(text, "--gpu")
    assert message in str(error.value)
    assert str(error.value).startswith("--gpu")
    assert "\n" not in str(error.value)


def test_a_limit_holds_below_the_card_and_is_refused_above_it():
    assert limit_of(None, None) is None
    assert limit_of("rtx4090", None) == int(23.52 * GIB)
    assert limit_of(None, "8GiB") == 8 * GIB
    assert limit_of("rtx4090", "20GiB") == 20 * GIB
    with pytest.raises(InputError, match=r"memory_limit 24GiB is 24 GiB, more than the 23\.52 GiB"):
        limit_of("rtx4090", "24GiB")
