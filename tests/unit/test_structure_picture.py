"""The pictures in CONTRIBUTING.md show the code as it is."""

from __future__ import annotations

from tests.draw_structure import BEGIN, CONTRIBUTING, END, drawing


def test_the_pictures_are_up_to_date():
    shown = CONTRIBUTING.read_text().split(BEGIN)[1].split(END)[0].strip()
    assert shown == drawing(), "python -m tests.draw_structure draws them anew"
