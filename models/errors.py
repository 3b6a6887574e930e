"""What is wrong, in one line and as a terminal may show it."""
import sys


def one_line(error: Exception | str) -> str:
    """A message in one line, a question mark in place of what would steer the terminal: names of files and
    of tensors may hold any character."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(str(error).split()))


def fail(error: Exception | str) -> None:
    """Say in one line what is wrong, and leave with status 2."""
    print("error:", one_line(error), file=sys.stderr)
    sys.exit(2)
