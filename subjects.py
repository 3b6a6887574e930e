"""Who is put into a picture: from `--subject` and a prompt to the tokens and features of people."""
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

# Words that a subject may stand for when it is given without WORD=.
PEOPLE = ("man", "woman", "boy", "girl", "person", "kid", "child", "baby", "guy", "lady", "gentleman",
          "father", "mother", "dad", "mom", "son", "daughter", "grandfather", "grandmother", "friend")
SUBJECT = "[WORD=]FILE[,FILE...][@T]"


class Place(NamedTuple):
    """Where a subject stands in the prompt."""

    word: str
    end: int  # index of the character behind the word
    files: list[str]  # pictures of one person
    start: int | None = None  # the timestep below which the person is there

    def __str__(self) -> str:
        """As a flag would say it, files by name only."""
        return f"{self.word}={self.name}"

    @property
    def name(self) -> str:
        """Without the word."""
        names = ",".join(Path(file).name for file in self.files)
        return names + (f"@{self.start}" if self.start is not None else "")


def bind_subjects(prompt: str, arguments: Sequence[str]) -> list[Place]:
    """Which word of the prompt each subject stands for.

    WORD=FILE takes the next free occurrence of WORD, N=FILE the N-th word for a person; a bare FILE the
    next free word for a person. Raises ValueError when there is none.
    """
    parsed = [split_subject(argument) for argument in arguments]
    bound: dict[int, Place] = {}
    for i, (word, files, start) in sorted(enumerate(parsed), key=lambda item: item[1][0] is None):
        taken = {place.end for place in bound.values()}
        free = [match for match in candidates(prompt, word) if match.end() not in taken]
        if not free:
            raise ValueError(no_place(prompt, word, arguments[i]))
        bound[i] = Place(free[0][0].lower(), free[0].end(), files, start)
    return [bound[i] for i in range(len(parsed))]


def bind_castings(prompt: str, rows: Sequence[str], keep: Sequence[str] = ()) -> list[list[Place]]:
    """The castings of one prompt: each row's people, `SUBJECT+SUBJECT...`, and those kept in all, in the
    order of their words.

    Raises ValueError as `bind_subjects` does.
    """
    return [sorted(bind_subjects(prompt, [*keep, *split_casting(row)]), key=lambda place: place.end)
            for row in rows]


def split_casting(argument: str) -> list[str]:
    """The people of `SUBJECT+SUBJECT...`. A + in a file's name is told by its existing."""
    parts, people = argument.split("+"), []
    while parts:
        count = next((k for k in range(len(parts), 1, -1) if is_subject("+".join(parts[:k]))), 1)
        people.append("+".join(parts[:count]))
        parts = parts[count:]
    if len(people) > 1 and not all(people):
        raise ValueError(f"subject {argument}: a photo is missing before or behind the +")
    return people


def is_subject(argument: str) -> bool:
    """Whether this is one person, whose photos are there, even where their names have a +."""
    word, files, _ = split_subject(argument)
    return "+" not in (word or "") and all(Path(file).exists() for file in files)


def split_subject(argument: str) -> tuple[str | None, list[str], int | None]:
    """[WORD=]FILE[,FILE...][@T] -> word or None, files, T or None. A path that has one of these marks
    itself is told by existing, or by a / before the =. Raises ValueError."""
    word, equals, rest = argument.partition("=")
    if not equals or "/" in word or Path(argument).exists():
        word, rest = None, argument
    elif not word.strip():
        raise ValueError(f"subject {argument}: the word before = is empty")
    start = None
    timed = re.fullmatch(r"(.+)@(\d+)", rest)
    if timed and not Path(rest).exists():
        rest, start = timed[1], int(timed[2])
        if not 0 < start <= 1000:
            raise ValueError(f"subject {argument}: the timestep behind @ must be in 1..1000, not {start}")
    files = [rest] if Path(rest).exists() else [file.strip() for file in rest.split(",")]
    if not all(files):
        raise ValueError(f"subject {argument!r}: the name of a file is empty")
    return word.strip().lower() if word else None, files, start


def candidates(prompt: str, word: str | None) -> list[re.Match]:
    """Where in a prompt a subject could stand, in order."""
    if word and word.isdecimal():
        return find_words(prompt, PEOPLE)[int(word) - 1:][:1] if int(word) else []
    return find_words(prompt, [word] if word else PEOPLE)


def find_words(prompt: str, words) -> list[re.Match]:
    """The whole words of a prompt that are among `words`, in order."""
    pattern = rf"(?<!\w)(?:{'|'.join(map(re.escape, words))})(?!\w)"
    return list(re.finditer(pattern, prompt, re.IGNORECASE))


def no_place(prompt: str, word: str | None, argument: str) -> str:
    """Why a subject has no word, and what to do."""
    if word and word.isdecimal():
        return (f"--subject {argument}: the prompt has {len(find_words(prompt, PEOPLE))} words for people, "
                f"each for one subject, and no free one of number {word}: {prompt!r}")
    if word and find_words(prompt, [word]):
        return f"subject {argument}: every {word!r} in the prompt has a subject already: {prompt!r}"
    if word:
        return f"subject {argument}: there is no {word!r} in the prompt: {prompt!r}"
    if find_words(prompt, PEOPLE):
        return (f"subject {argument}: more subjects than words for people in the prompt: {prompt!r}. "
                f"Add a word, or say WORD={argument}")
    return (f"subject {argument}: nobody in the prompt to stand for: {prompt!r}. Write one of "
            f"{', '.join(PEOPLE[:6])}, ..., or say WORD={argument} with a word of the prompt")


def read_photos(places: Sequence[Place]) -> list[list]:
    """The pictures of each subject, (3, H, W) in [0, 1]. Raises ValueError naming the file."""
    from images import read_picture
    return [[read_picture(file) for file in place.files] for place in places]


def cut_people(picture, keep: Sequence[int], mask: Path | None, boxes: Sequence[str]) -> list[list]:
    """Photos, as `read_photos` gives them, of the people of a picture (3, H, W) who are to be kept.

    keep: their numbers, from 1. mask, boxes: where people are, see `images.read_masks` and `box_mask`. The
    N-th from the left is the N-th person; of as many as are kept, all are. Raises ValueError.
    """
    from images import box_mask, cut_person, read_masks
    if bool(keep) != bool(mask or boxes):
        raise ValueError("--keep and --mask or --box go together: who stays, and where people are")
    found = [box_mask(box, picture) for box in boxes] + (read_masks(mask, picture) if mask else [])
    found.sort(key=lambda person: person.nonzero()[:, 1].float().mean().item())
    numbers = sorted(keep) if len(found) == len(keep) else range(1, len(found) + 1)
    people = dict(zip(numbers, found, strict=True))
    if missing := set(keep) - people.keys():
        raise ValueError(f"--keep {min(missing)}: only {len(found)} people are marked in the picture")
    return [[cut_person(picture, people[number])] for number in keep]


def encode_person(pipeline, weights: Path, files: Sequence[str], photos: Sequence):
    """The image feature (F,) of a person, for several pictures their mean; a warning for each that is
    not of the weights' world."""
    features = [pipeline.encode_subjects(photo[None])[0] for photo in photos]
    for feature, file in zip(features, files, strict=True):
        warn_if_foreign(weights, pipeline.models.config, feature, file)
    return sum(features) / len(features)


def make_subjects(pipeline, prompt: str, places: Sequence[Place], features: Sequence) -> list:
    """The people of a prompt, with the features (F,) of each, for `Pipeline.generate`.

    Raises ValueError for a word that is not known or that lies behind the last token.
    """
    from pipeline import Subject
    return [Subject(find_token(pipeline.models.tokenize, prompt, place), feature,
                    **({} if place.start is None else {"start": place.start}))
            for place, feature in zip(places, features, strict=True)]


def cast(pipeline, weights: Path, prompt: str, castings: Sequence[Sequence[Place]],
         photos: Sequence[Sequence[list]]) -> list[list]:
    """The people of each casting of a prompt, for `Pipeline.generate`; who is in several of them is
    encoded once. photos: as `read_photos` gives them. Raises ValueError as `make_subjects` does."""
    features = {}
    for places, pictures in zip(castings, photos, strict=True):
        for place, several in zip(places, pictures, strict=True):
            if tuple(place.files) not in features:
                features[tuple(place.files)] = encode_person(pipeline, weights, place.files, several)
    return [make_subjects(pipeline, prompt, places, [features[tuple(place.files)] for place in places])
            for places in castings]


def find_token(tokenize, prompt: str, place: Place) -> int:
    """Index of the token that a subject is fused into. Raises ValueError if there is none."""
    word, end, files, _ = place
    if tokenize.unknown_words(word):
        known = [person for person in PEOPLE if not tokenize.unknown_words(person)]
        raise ValueError(f"subject {files[0]}: these weights do not know the word {word!r}; the people "
                         f"they know: {', '.join(known)}")
    before = tokenize.encode(prompt[:end])
    if len(before) > tokenize.length - 2 or before[-1:] != tokenize.encode(word)[-1:]:
        raise ValueError(f"subject {files[0]}: its word {word!r} lies beyond the {tokenize.length} tokens "
                         "of the prompt: make the prompt shorter")
    return len(before)


def warn_if_foreign(weights: Path, config: dict, feature, file: str) -> None:
    """Say so when a subject's image feature lies far from those that the weights were trained on.

    A weights folder may tell where these lie, in `subjects.safetensors`. Raises ValueError if it cannot
    be used.
    """
    from models import WeightsError
    from models.load import read_tensors
    from pipeline import squared_distance
    path = weights / "subjects.safetensors"
    if not path.exists():
        return
    try:
        world = read_tensors(path)
        distance = squared_distance(feature[None].cpu(), world["mean"], world["precision"])
        foreign = bool(distance > world["limit"])
    except (WeightsError, KeyError, RuntimeError) as error:
        raise ValueError(f"{path} does not fit these weights: {error}") from error
    if foreign:
        advice = ("; they know a small cartoon world only, for photos use Stable Diffusion 1.5's"
                  if config.get("world") == "toyworld" else "")
        warnings.warn(f"{file} looks like nobody that these weights were trained on, the picture will "
                      f"hardly resemble it{advice}", stacklevel=2)
