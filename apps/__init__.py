"""The paper's applications, a short script each (`python -m apps.swap`), and what several of them do."""
import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

# First, since it sets up torch.
from sample import check_writable, generate_images, keep_inputs, load_pipeline, save

from PIL import Image
from torch import Tensor

from images import labelled, page, portrait
from pipeline import Pipeline, Subject, bytes_of
from subjects import BoundSubject, read_photos

ANIMATIONS = (".gif", ".png")


def load_people(args: argparse.Namespace, rows: Sequence[Sequence[BoundSubject]],
                outputs: Sequence[Path | None]
                ) -> tuple[Pipeline, list[list[list[Tensor]]], list[list[Subject]]]:
    """The pipeline; for each row of subjects of `args.prompt` their photos, a list (3, H, W) for each; and
    the subjects for `Pipeline.generate`. Raises ValueError, before loading if an output would replace a
    photo."""
    subjects = [subject for row in rows for subject in row]
    keep_inputs(args, subjects, outputs)
    photos = [read_photos(row) for row in rows]
    pipeline = load_pipeline(args, True if subjects else None, people=bool(subjects))
    people = [pipeline.make_subjects(args.prompt, row, pipeline.encode_photos(row, several))
              for row, several in zip(rows, photos, strict=True)]
    return pipeline, photos, people


def generate_rows(args: argparse.Namespace, pipeline: Pipeline, rows: Sequence[Sequence[Subject] | None],
                  seeds: Sequence[int | Tensor], watch: Callable | None = None) -> list[list[Image.Image]]:
    """A row of pictures of `args.prompt` per list of subjects (None: the prior alone), one picture per seed.

    The rows of a seed share a batch, so that the steps which the prior draws are computed once for all of
    them. Rows of the same subjects are drawn once: with several threads the samples of a batch come out
    alike up to rounding only. seeds, watch: as in `generate_images`.
    """
    keys = [people if people is None else
            tuple((one.position, one.start, *bytes_of(one.feature[None])) for one in people)
            for people in rows]
    distinct = dict(zip(keys, rows, strict=True))
    pairs = [(seed, people) for seed in seeds for people in distinct.values()]
    images = list(generate_images(args, pipeline, [args.prompt] * len(pairs), [seed for seed, _ in pairs],
                                  [people for _, people in pairs], watch, group=len(distinct)))
    found = {key: images[k::len(distinct)] for k, key in enumerate(distinct)}
    return [found[key] for key in keys]


def rows_sheet(title: str, photos: Sequence[Sequence[Sequence[Tensor]]], names: Sequence[str],
               rows: Sequence[Sequence[Image.Image]], columns: Sequence[str]) -> Image.Image:
    """The title, then `generate_rows`' rows: the photos of each, over its name, and its pictures, over the
    names of the columns."""
    tiles = []
    for several, name, pictures in zip(photos, names, rows, strict=True):
        flat = [photo for person in several for photo in person]
        tiles += [(portrait(flat, pictures[0].size), name), *zip(pictures, columns, strict=True)]
    return page(title, labelled(tiles, 1 + len(columns)))


def strip(title: str, tiles: Sequence[tuple[Image.Image, str]]) -> Image.Image:
    """Pictures in one row, each with its label, below a title."""
    return page(title, labelled(tiles, len(tiles)))


def amounts(count: int) -> list[float]:
    """How far each of `count` frames is on the way from the first to the last, from 0 to 1."""
    return [round(k / (count - 1), 3) for k in range(count)]


def frame_labels(count: int, first: str = "0.00", last: str = "1.00") -> list[str]:
    """`amounts` to be shown, the first and the last by other names if given."""
    return [first, *(f"{amount:.2f}" for amount in amounts(count)[1:-1]), last]


def plan_sheet(output: Path, count: int) -> tuple[Path, list[Path]]:
    """The file of a sheet and, where --output is a folder, those of its `count` pictures. Raises ValueError
    where they cannot be written."""
    if output.suffix.lower() not in ("", ".png") and not output.is_dir():
        raise ValueError(f"--output {output}: pictures are saved as .png, give a name that ends so, or a "
                         "folder")
    folder = output.is_dir() or not output.suffix
    sheet = output / "sheet.png" if folder else output
    check_writable("--output", sheet)
    return sheet, [output / f"{k:03d}.png" for k in range(count)] if folder else []


def save_sheet(sheet: Image.Image, path: Path, settings: dict, images: Sequence[Image.Image],
               files: Sequence[Path], own: Sequence[dict]) -> None:
    """Save a sheet and, where `plan_sheet` gave files for them, its pictures, each with its own settings
    besides those of all."""
    for image, file, more in zip(images, files, own, strict=False):  # no files without a folder
        save(image, file, {**settings, **more})
    save(sheet, path, settings)
