"""What is wrong, as a terminal shows it."""


def one_line(error: Exception | str) -> str:
    """A message in one line, a question mark in place of what would steer the terminal: names of files and
    of tensors may hold any character."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(str(error).split()))
