"""What is wrong, in one line and as a terminal may show it."""
import argparse
import re
import sys
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

PACKAGES = ("torch", "einops", "safetensors", "open_clip", "numpy", "PIL", "tqdm")  # of requirements.txt


def check_installed() -> None:
    """Leave with one line where a package is missing."""
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        fail(f"{', '.join(missing)}: not installed. Give: pip install -r requirements.txt")


def one_line(error: Exception | str) -> str:
    """A message in one line, a question mark in place of what would steer the terminal: names of files and
    of tensors may hold any character."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(str(error).split()))


def fail(error: Exception | str) -> NoReturn:
    """Say in one line what is wrong, and leave with status 2."""
    print("error:", one_line(error), file=sys.stderr)
    sys.exit(2)


def fail_if_memory(error: MemoryError | RuntimeError, cure: str) -> NoReturn:
    """Say what to do where memory ran out, and leave with status 2; raises any other error again."""
    if "allocate" not in str(error):  # on a CPU, torch has no error class for it
        raise error
    fail(f"not enough memory: {cure}")


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps a command's help on one screen: its usage has only what it works on and what must be given."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=32)

    def add_usage(self, usage, actions, groups, prefix=None) -> None:
        needed = [action for action in actions if action.required or not action.option_strings]
        needed += [action for group in groups if group.required for action in group._group_actions]
        super().add_usage(usage, needed, groups, prefix)


class Parser(argparse.ArgumentParser):
    """A command's flags, none of which may be shortened: `--subject` is not `--subjects`."""

    def __init__(self, description: str, **options):
        super().__init__(description=description, formatter_class=HelpFormatter, allow_abbrev=False,
                         **options)

    def error(self, message: str) -> NoReturn:
        fail(f"{message}; see --help")


def no_file(path: str | Path) -> str:
    """Why there is no file of this name."""
    if re.match(r"https?:/", str(path)):
        return f"{path} is an address: download it first, and give the file"
    if Path(path).exists():
        return f"{path} is not a file"
    start = "" if Path(path).is_absolute() else " (paths start at the current folder)"
    return f"{path} does not exist{start}"


def near(word: str, known: list[str] | tuple[str, ...]) -> str:
    """" (perhaps woman)" for "womn"; empty where no known word is like it, or the word is very short."""
    found = get_close_matches(word.lower(), known, 1, cutoff=0.8) if len(word) > 2 else []
    return f" (perhaps {found[0]})" if found else ""
