"""Tables: aligned text, or by rich on a terminal."""

import sys

from qframework.graph.table import Table

TABLE = Table("Numbers", ["name", "value"], [["a", "1"], ["long name", "22"]], 1)


def test_text_is_aligned_where_there_is_no_terminal() -> None:
    assert str(TABLE).splitlines() == [
        "name       value",
        "----------------",
        "a              1",
        "long name     22",
    ]


def test_on_a_terminal_it_is_drawn_by_rich_without_escapes(monkeypatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    text = str(TABLE)
    assert "Numbers" in text and "long name" in text and "\x1b" not in text
    assert "─" in text


def test_without_rich_it_is_text_on_a_terminal_too(monkeypatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("qframework.graph.table.find_spec", lambda name: None)
    assert str(TABLE) == TABLE.to_text()
