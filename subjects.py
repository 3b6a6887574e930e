"""Who is put into a picture: which word of the prompt each subject stands for, and the photos of each."""
import math
import re
import warnings
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from data.build import find_people
from data.masks import cut_out, mask_of, read_mask
from images import read_picture
from models.errors import near

# Words that a subject may stand for when it is given without WORD=.
PEOPLE = ("man", "woman", "boy", "girl", "person", "kid", "child", "baby", "guy", "lady", "gentleman",
          "father", "mother", "dad", "mom", "son", "daughter", "grandfather", "grandmother", "friend")
SUBJECT = "[WORD=]FILE[#N][,FILE[#N]...]"
MOST_COLOURS = 20  # of a mask; one with soft edges has hundreds
CUT_GROUND, CUT_SIDE = 0.85, 1.1  # around a person in the small world: grey, and the square's side


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
    """[WORD=]FILE[#N][,FILE[#N]...] -> word or None, files with their #N.

    A path that has one of these marks itself is told by existing, or by a / before the =. Raises ValueError.
    """
    word, equals, rest = argument.partition("=")
    if not equals or "/" in word or Path(argument).exists():
        word, rest = "", argument
    files = [rest] if file_of(rest).exists() else [file.strip() for file in rest.split(",")]
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
        return (f"subject {argument}: no word is free for number {word}. Words for people count from 1, the "
                f"prompt has {people}, each for one subject: {prompt!r}")
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


def split_number(file: str) -> tuple[Path, int | None]:
    """FILE#N -> FILE and N, the number of a person on it; None without #N, and where a file has that name."""
    found = re.fullmatch(r"(.+)#(\d{1,9})", file)
    return (Path(found[1]), int(found[2])) if found and not Path(file).exists() else (Path(file), None)


def file_of(file: str) -> Path:
    """FILE#N -> FILE."""
    return split_number(file)[0]


def read_photos(subjects: Sequence[BoundSubject], masks: Sequence[Path] = ()) -> list[list[Tensor]]:
    """The photos of each subject, as `read_photo` gives them.

    masks: for each subject its photo's, in place of the file NAME_mask.png beside it. Raises ValueError.
    """
    if masks and (len(masks) != len(subjects) or any(len(subject.files) > 1 for subject in subjects)):
        raise ValueError(f"{len(masks)} --subject-mask for {len(subjects)} --subject: give one for each, of "
                         "one photo each; others need a NAME_mask.png beside them")
    return [[read_photo(file, mask) for file in subject.files]
            for subject, mask in zip_longest(subjects, masks)]


def read_photo(file: str, mask: Path | None = None) -> Tensor:
    """A picture (3, H, W) in [0, 1], or of one with a mask a person alone, (4, h, w) as in `cut_person`.

    file: FILE, or FILE#N for person N of the mask; without N it is the largest. mask: as `read_mask` reads
    it, NAME_mask.png by default. Raises ValueError naming the file.
    """
    path, number = split_number(file)
    picture = read_picture(path)
    mask = mask or mask_of(path)
    if not mask.exists():
        if number is None and mask == mask_of(path):
            return picture
        raise ValueError(f"{file}: there is no {mask} that says who is where")
    try:
        labels = read_mask(mask, (picture.shape[2], picture.shape[1])).astype(int)
    except (ValueError, OSError) as error:
        raise ValueError(f"{mask}: {error}") from error
    people = dict(zip(*np.unique(labels[labels > 0], return_counts=True), strict=True))
    if number is None:
        number = max(people, key=people.get)
        if len(people) > 1:
            warnings.warn(f"{path} shows {len(people)} people, the largest is taken; "
                          f"{', '.join(f'{path.name}#{each}' for each in people)} say who", stacklevel=2)
    elif number not in people:
        raise ValueError(f"{file}: the people on {mask} are {', '.join(map(str, people))}")
    if (labels == number).all():
        raise ValueError(f"{mask}: person {number} covers the whole photo, so nobody is cut out: mark the "
                         "pixels of the person only, or take the mask away")
    return cut_person(picture, torch.from_numpy(labels == number))


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
    """A person of a picture (3, H, W): (4, h, w) in [0, 1], cropped to the mask (H, W) bool, which is not
    empty and becomes the fourth channel."""
    rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
    return torch.cat([picture, mask[None]])[:, rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1]


def on_noise(person: Tensor) -> Tensor:
    """A photo (3, h, w), or a person alone (4, h, w) on noise, as training from photos shows them:
    (3, h, w)."""
    if len(person) == 3:
        return person
    pixels = rearrange((person[:3] * 255).round().byte(), "c h w -> h w c").numpy()
    alone = cut_out(pixels, person[3].bool().numpy(), np.random.default_rng(0))
    return rearrange(torch.from_numpy(alone), "h w c -> c h w") / 255


def on_grey(person: Tensor) -> Tensor:
    """A photo (3, h, w), or a person alone (4, h, w) as the small world's references show them: on light
    grey, whole, in the middle of a square (3, S, S)."""
    if len(person) == 3:
        return person
    height, width = person.shape[1:]
    side = math.ceil(max(height, width) * CUT_SIDE)
    square, (top, left) = torch.full((3, side, side), CUT_GROUND), ((side - height) // 2, (side - width) // 2)
    square[:, top:top + height, left:left + width] = torch.where(person[3].bool(), person[:3], CUT_GROUND)
    return square
