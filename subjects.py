"""Who is put into a picture: which word of the prompt each subject stands for, and the photos of each."""
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from data.build import find_people
from images import read_picture
from models.errors import near

# Words that a subject may stand for when it is given without WORD=.
PEOPLE = ("man", "woman", "boy", "girl", "person", "kid", "child", "baby", "guy", "lady", "gentleman",
          "father", "mother", "dad", "mom", "son", "daughter", "grandfather", "grandmother", "friend")
SUBJECT = "[WORD=]FILE[,FILE...]"
MOST_COLOURS = 20  # of a mask; one with soft edges has hundreds
CUT_GROUND, CUT_SIDE = 0.85, 1.1  # around a person cut from a picture: grey, and the square's side


class BoundSubject(NamedTuple):
    """A subject and the word of the prompt that it stands for."""

    word: str
    end: int  # index of the character behind the word
    files: list[str]  # pictures of one person

    def __str__(self) -> str:
        """As a flag would say it, files by name only."""
        return f"{self.word}={self.name}"

    @property
    def name(self) -> str:
        """Without the word."""
        return ",".join(Path(file).name for file in self.files)


def bind_subjects(prompt: str, arguments: Sequence[str]) -> list[BoundSubject]:
    """Which word of the prompt each subject stands for.

    WORD=FILE takes the next free occurrence of WORD, N=FILE the N-th word for a person; a bare FILE the
    next free word for a person. Raises ValueError when there is none.
    """
    parsed = [split_subject(argument) for argument in arguments]
    bound: dict[int, BoundSubject] = {}
    for i, (word, files) in sorted(enumerate(parsed), key=lambda item: item[1][0] is None):
        taken = {subject.end for subject in bound.values()}
        free = [match for match in candidates(prompt, word) if match.end() not in taken]
        if not free:
            raise ValueError(no_word(prompt, word, arguments[i]))
        bound[i] = BoundSubject(free[0][0].lower(), free[0].end(), files)
    return [bound[i] for i in range(len(parsed))]


def bind_rows(prompt: str, rows: Sequence[str], keep: Sequence[str] = ()) -> list[list[BoundSubject]]:
    """The subjects of one prompt row by row: each row's, `SUBJECT+SUBJECT...`, and those kept in all, in
    the order of their words. Raises ValueError as `bind_subjects` does."""
    return [sorted(bind_subjects(prompt, [*keep, *row.split("+")]), key=lambda subject: subject.end)
            for row in rows]


def split_subject(argument: str) -> tuple[str | None, list[str]]:
    """[WORD=]FILE[,FILE...] -> word or None, files. A path that has one of these marks itself is told by
    existing, or by a / before the =. Raises ValueError."""
    word, equals, rest = argument.partition("=")
    if not equals or "/" in word or Path(argument).exists():
        word, rest = "", argument
    files = [rest] if Path(rest).exists() else [file.strip() for file in rest.split(",")]
    if not all(files):
        raise ValueError(f"subject {argument!r}: the name of a file is empty")
    return word.strip().lower() or None, files


def candidates(prompt: str, word: str | None) -> list[re.Match]:
    """Where in a prompt a subject could stand, in order."""
    if word and word.isdecimal():
        return find_words(prompt, PEOPLE)[int(word) - 1:][:1] if int(word) else []
    return find_words(prompt, [word] if word else PEOPLE)


def find_words(prompt: str, words: Sequence[str]) -> list[re.Match]:
    """The whole words of a prompt that are among `words`, in order."""
    pattern = rf"(?<!\w)(?:{'|'.join(map(re.escape, words))})(?!\w)"
    return list(re.finditer(pattern, prompt, re.IGNORECASE))


def no_word(prompt: str, word: str | None, argument: str) -> str:
    """Why there is no word for a subject, and what to do."""
    people = len(find_words(prompt, PEOPLE))
    words = re.findall(r"\w+", prompt.lower())
    one_by_one, _ = find_people(prompt, PEOPLE)
    if one_by_one != prompt:
        return f"subject {argument}: each subject needs a word of its own in the prompt, write: {one_by_one}"
    if word and word.isdecimal():
        return (f"subject {argument}: the prompt has {people} words for people, each for one subject, and no "
                f"free one of number {word}: {prompt!r}")
    if word and find_words(prompt, [word]):
        return f"subject {argument}: every {word!r} in the prompt has a subject already: {prompt!r}"
    if word:
        return f"subject {argument}: there is no {word!r} in the prompt{near(word, words)}: {prompt!r}"
    if people:
        return (f"subject {argument}: more subjects than words for people in the prompt: {prompt!r}. "
                f"Add a word, or say WORD={argument}")
    meant = ", ".join(each + near(each, PEOPLE) for each in words if near(each, PEOPLE))
    return (f"subject {argument}: nobody in the prompt to stand for: {meant or repr(prompt)}. Write one of "
            f"{', '.join(PEOPLE[:6])}, ..., or say WORD={argument} with a word of the prompt")


def read_photos(subjects: Sequence[BoundSubject]) -> list[list[Tensor]]:
    """The pictures of each subject, (3, H, W) in [0, 1]. Raises ValueError naming the file."""
    return [[read_picture(file) for file in subject.files] for subject in subjects]


# --- people cut from a picture ---


def cut_people(picture: Tensor, keep: Sequence[int], mask: Path | None, boxes: Sequence[str]
               ) -> list[list[Tensor]]:
    """Photos, as `read_photos` gives them, of the people of a picture (3, H, W) who are to be kept.

    keep: their numbers, from 1. mask, boxes: where people are, see `read_masks` and `box_mask`. The N-th
    from the left is the N-th person; of as many as are kept, all are. Raises ValueError.
    """
    if bool(keep) != bool(mask or boxes):
        raise ValueError("--keep and --mask or --box go together: who stays, and where people are")
    found = [box_mask(box, picture) for box in boxes] + (read_masks(mask, picture) if mask else [])
    found.sort(key=lambda person: person.nonzero()[:, 1].float().mean().item())
    numbers = sorted(keep) if len(found) == len(keep) else range(1, len(found) + 1)
    people = dict(zip(numbers, found, strict=True))
    if missing := set(keep) - people.keys():
        raise ValueError(f"--keep {min(missing)}: only {len(found)} people are marked in the picture")
    return [[cut_person(picture, people[number])] for number in keep]


def read_masks(path: Path, picture: Tensor) -> list[Tensor]:
    """The people of a picture (3, H, W), each (H, W) bool, from a picture of the same size in which each has
    a colour of their own and the rest is black or transparent. Raises ValueError."""
    red, green, blue = (read_picture(path, labels=True) * 255).round().long()
    if red.shape != picture.shape[1:]:
        sizes = [f"{width} x {height}" for height, width in (red.shape, picture.shape[1:])]
        raise ValueError(f"{path} has {sizes[0]} pixels, the picture {sizes[1]}: they must be alike")
    colours = (red << 16) + (green << 8) + blue
    people = [colours == colour for colour in colours.unique() if colour]
    if not 1 <= len(people) <= MOST_COLOURS:
        raise ValueError(f"{path} has {len(people)} colours besides black: give each person one, in a file "
                         "without blur and losses such as a PNG")
    return people


def box_mask(box: str, picture: Tensor) -> Tensor:
    """(H, W) bool, true in "x0,y0,x1,y1" of a picture (3, H, W), but not at x1 and y1. Raises ValueError."""
    height, width = picture.shape[1:]
    numbers = re.fullmatch(r"(\d{1,9}),(\d{1,9}),(\d{1,9}),(\d{1,9})", box)
    if not numbers:
        raise ValueError(f"--box {box}: give four whole numbers x0,y0,x1,y1")
    x0, y0, x1, y1 = map(int, numbers.groups())
    if not (x0 < x1 <= width and y0 < y1 <= height):
        raise ValueError(f"--box {box} must be an area inside the picture's {width} x {height} pixels")
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[y0:y1, x0:x1] = True
    return mask


def cut_person(picture: Tensor, mask: Tensor) -> Tensor:
    """A person of a picture as a photo of their own: on light grey, whole, in the middle of a square.

    picture: (3, H, W) in [0, 1]. mask: (H, W) bool, not empty. Returns (3, S, S) in [0, 1].
    """
    rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
    box = slice(None), slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    person = torch.where(mask, picture, CUT_GROUND)[box]
    side = math.ceil(max(person.shape[1:]) * CUT_SIDE)
    square = torch.full((3, side, side), CUT_GROUND)
    top, left = ((side - length) // 2 for length in person.shape[1:])
    square[:, top:top + person.shape[1], left:left + person.shape[2]] = person
    return square
