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

import command
from subjects import Place, encode_person, make_subjects, read_photos

MOST_PEOPLE = 4  # in one picture, as in training


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = command.Parser(__doc__)
    parser.add_argument("story", type=Path, help="a JSON file, see above")
    parser.add_argument("--output", type=Path, default=Path("story.png"), metavar="PATH",
        help="a .png for the strip, or a folder for the strip and each picture (default story.png)")
    command.add_flags(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    command.execute(run, parse_args(argv))


def run(args: argparse.Namespace) -> None:
    command.check(args)
    characters, scenes = read_story(args.story)
    prompts, casts, seeds = zip(*scenes, strict=True)
    everybody = list(characters.values())
    sheet, files = command.plan_sheet(args.output, len(scenes))
    command.keep_photos(args, everybody, [sheet, *files])
    from images import captioned, labelled, portrait, stack
    photos = read_photos(everybody)
    pipeline = command.load_pipeline(args)
    features = {tuple(person.files): encode_person(pipeline, args.weights, person.files, pictures)
                for person, pictures in zip(everybody, photos, strict=True)}
    people = []
    for k, (prompt, cast) in enumerate(zip(prompts, casts, strict=True)):
        with command.naming(f"{args.story}, scene {k}"):
            command.check_words(pipeline, [prompt])
            people.append(make_subjects(pipeline, prompt, cast, [features[tuple(p.files)] for p in cast]))
    seeds = [args.seed + k if seed is None else seed for k, seed in enumerate(seeds)]
    print(f"seed {args.seed}", flush=True)
    images = list(command.draw(args, pipeline, prompts, seeds, people))

    portraits = [(portrait(pictures, images[0].size), name)
                 for name, pictures in zip(characters, photos, strict=True)]
    told = stack([labelled(portraits, 5), captioned(list(zip(images, prompts, strict=True)))])
    own = [{**command.describe(args, cast), "prompt": prompt, "seed": seed}
           for prompt, cast, seed in zip(prompts, casts, seeds, strict=True)]
    command.save_sheet(told, sheet, {"prompt": "\n".join(prompts), **command.describe(args, everybody)},
                       images, files, own)


def read_story(path: Path) -> tuple[dict[str, Place], list[tuple]]:
    """The characters by name, and per scene its prompt, the people in it and its seed. Raises ValueError."""
    story = command.read_json(path, characters=dict, scenes=list)
    characters, scenes = {}, []
    for name, person in story["characters"].items():
        command.check_keys(f"{path}, character {name!r}", person, word=str, photos=list)
        characters[name] = Place(person["word"], 0, [str(path.parent / str(p)) for p in person["photos"]])
    for k, scene in enumerate(story["scenes"]):
        with command.naming(f"{path}, scene {k}"):
            command.check_keys("it", scene, optional=["seed"], prompt=str)
            command.check_prompt("its prompt", scene["prompt"])
            command.check_seed(scene.get("seed", 0))
            scenes.append((*write_prompt(scene["prompt"], characters), scene.get("seed")))
    return characters, scenes


def write_prompt(prompt: str, characters: dict[str, Place]) -> tuple[str, list[Place]]:
    """A scene's prompt with every {name} replaced by its word, and where these end. Raises ValueError."""
    written, places = "", []
    for k, part in enumerate(re.split(r"\{(.*?)\}", prompt)):
        if k % 2 and part not in characters:
            raise ValueError(f"there is no character {part!r} for {prompt!r}, only {', '.join(characters)}")
        written += characters[part].word if k % 2 else part
        if k % 2:
            places.append(characters[part]._replace(end=len(written)))
    if len(places) > MOST_PEOPLE:
        raise ValueError(f"{len(places)} people are too many, a picture takes {MOST_PEOPLE}: {prompt!r}")
    return written, places


if __name__ == "__main__":
    main()
