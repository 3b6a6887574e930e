"""What is printed as an error does not steer the terminal."""
import pytest

from data import build
from models import errors
from models.errors import one_line


@pytest.mark.parametrize(("text", "shown"), [
    ("a\x1b[31m b\x07\x9b.png", "a?[31m b??.png"), (" two\n lines\r\tof it ", "two lines of it"),
    ("zoë 笑.png", "zoë 笑.png"), ("\u202egnp.exe \udcff", "?gnp.exe ?"), (ValueError(""), "")])
def test_one_line_that_a_terminal_shows_as_it_is(text, shown):
    assert one_line(text) == shown


def test_the_report_on_a_dataset_shows_its_words_so():
    facts = build.Facts((64, 64), ["wo\x1b[31mman"], [9], [], 1, 0)
    lines = build.report([facts], build.NOUNS)
    assert all(line.isprintable() for line in lines) and "words     wo?[31mman 1" in lines


def test_what_is_not_installed_is_named(monkeypatch, capsys):
    errors.check_installed()
    monkeypatch.setattr(errors, "PACKAGES", ("torch", "no_such_package"))
    with pytest.raises(SystemExit, match="2"):
        errors.check_installed()
    assert capsys.readouterr().err == (
        "error: no_such_package: not installed. Give: pip install -r requirements.txt\n")
