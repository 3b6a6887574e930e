"""Tell a story with the same people in every picture (MoA paper, Appendix E.3, Fig. 23).

    python -m apps.story examples/story.json

The story is a JSON file, at whose folder paths start. The last word of `word` is fused with the photos:

    {"characters": {"Ada": {"word": "a woman", "photos": ["ada.png"]}},
     "scenes": [{"prompt": "{Ada} reading a book in the snow"},
                {"prompt": "{Ada} running on the beach", "seed": 7}]}

Scene k, from 0, has seed --seed + k unless it names its own.
"""
import argparse
import re
from pathlib import Path

from apps import plan_sheet, save_sheet
from images import captioned, labelled, portrait, stack
from models.load import read_json
from sample import (Parser, add_flags, check, check_keys, execute, generate_images, keep_inputs,
                    load_pipeline, naming, settings_of)
from subjects import BoundSubject, read_photos

COLUMNS = 5


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("story", type=Path, help="a JSON file, see above")
    parser.add_argument("--output", type=Path, default=Path("story.png"), metavar="PATH",
        help="a .png for the strip, or a folder for the strip and each picture (default story.png)")
    add_flags(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    execute(run, parse_args(argv))


def run(args: argparse.Namespace) -> None:
    check(args)
    with naming(str(args.story)):
        characters, scenes = read_story(args.story)
    prompts, subjects, seeds = zip(*scenes, strict=True)
    everybody = list(characters.values())
    sheet, files = plan_sheet(args.output, len(scenes))
    keep_inputs(args, everybody, [sheet, *files])
    photos = read_photos(everybody)
    pipeline = load_pipeline(args)
    features = dict(zip((tuple(one.files) for one in everybody), pipeline.encode_photos(everybody, photos),
                        strict=True))
    people = [pipeline.make_subjects(prompt, found, [features[tuple(one.files)] for one in found])
              for prompt, found in zip(prompts, subjects, strict=True)]
    seeds = [args.seed + k if seed is None else seed for k, seed in enumerate(seeds)]
    print(f"seed {args.seed}", flush=True)
    images = list(generate_images(args, pipeline, prompts, seeds, people))

    portraits = [(portrait(pictures, images[0].size), name)
                 for name, pictures in zip(characters, photos, strict=True)]
    told = stack([labelled(portraits, COLUMNS),
                  labelled([captioned(*tile) for tile in zip(images, prompts, strict=True)], COLUMNS)])
    own = [settings_of(args, found, prompt=prompt, seed=seed)
           for prompt, found, seed in zip(prompts, subjects, seeds, strict=True)]
    save_sheet(told, sheet, settings_of(args, everybody, prompt="\n".join(prompts)), images, files, own)


def read_story(path: Path) -> tuple[dict[str, BoundSubject], list[tuple]]:
    """Characters by name; per scene its prompt, the subjects in it, its seed or None. Raises ValueError."""
    story = read_json(path)
    check_keys(story, {"characters": dict, "scenes": list})
    characters, scenes = {}, []
    for name, person in story["characters"].items():
        with naming(f"character {name!r}"):
            check_keys(person, {"word": str, "photos": list})
        photos = [str(path.parent / str(photo)) for photo in person["photos"]]
        characters[name] = BoundSubject(person["word"], 0, photos)
    for k, scene in enumerate(story["scenes"]):
        with naming(f"scene {k}"):
            check_keys(scene, {"prompt": str}, {"seed": int})
            scenes.append((*write_prompt(scene["prompt"], characters), scene.get("seed")))
    return characters, scenes


def write_prompt(prompt: str, characters: dict[str, BoundSubject]) -> tuple[str, list[BoundSubject]]:
    """A scene's prompt with every {name} replaced by its word, and where these end. Raises ValueError."""
    written, subjects = "", []
    for k, part in enumerate(re.split(r"\{(.*?)\}", prompt)):
        if k % 2 == 0:
            written += part
        elif part in characters:
            written += characters[part].word
            subjects.append(characters[part]._replace(end=len(written)))
        else:
            raise ValueError(f"there is no character {part!r} for {prompt!r}, only {', '.join(characters)}")
    return written, subjects


if __name__ == "__main__":
    main()
