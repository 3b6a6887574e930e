"""What is printed as an error does not steer the terminal."""
import pytest

from errors import one_line


@pytest.mark.parametrize(("text", "shown"), [
    ("a\x1b[31m b\x07\x9b.png", "a?[31m b??.png"), (" two\n lines\r\tof it ", "two lines of it"),
    ("zoë 笑.png", "zoë 笑.png"), ("\u202egnp.exe \udcff", "?gnp.exe ?"), (ValueError(""), "")])
def test_one_line_that_a_terminal_shows_as_it_is(text, shown):
    assert one_line(text) == shown
