"""Boxes in a row, as text."""

from rich.cells import cell_len

from evenkeel.tools.drawing import bar, boxes


def test_boxes_stand_in_a_row_with_arrows() -> None:
    assert boxes([["one", "1"], ["three"]], 80) == [
        "╭───────╮ ╭───────╮",
        "│ one   │ │ three │",
        "│ 1     │→│       │",
        "╰───────╯ ╰───────╯",
    ]


def test_what_has_no_room_goes_into_the_next_row() -> None:
    drawn = boxes([["abc"]] * 5, 17)
    assert len(drawn) == 3 * 3
    assert drawn[1] == "│ abc │→│ abc │→"
    assert drawn[7] == "│ abc │"
    assert max(map(cell_len, drawn)) <= 17


def test_one_box_too_wide_is_drawn_all_the_same() -> None:
    assert len(boxes([["abcdef"], ["g"]], 5)) == 6


def test_a_bar_is_as_long_as_its_share() -> None:
    assert [bar(share, 4) for share in (-1, 0, 0.25, 0.5, 0.53125, 1, 2)] == [
        "    ",
        "    ",
        "█   ",
        "██  ",
        "██▏ ",
        "████",
        "████",
    ]
