"""Tell a story with the same people in every picture (MoA paper, Appendix E.3, Fig. 23).

    python apps/story.py examples/story.json

The story is a JSON file, its photos lie beside it. The last word of `word` is fused with them:

    {"characters": {"Ada": {"word": "a woman", "photos": ["ada.png"]}},
     "scenes": [{"prompt": "{Ada} reading a book in the snow"},
                {"prompt": "{Ada} running on the beach", "seed": 7}]}

Scene k, from 0, has seed --seed + k unless it names its own.
"""
import argparse
import re
import sys
from pathlib import Path

# A script has only its own folder on the path.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import command
from subjects import Place, encode_person, make_subjects, read_photos

MOST_PEOPLE = 4  # in one picture, as in training


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = command.Parser(__doc__)
    add = parser.add_argument
    add("story", type=Path, help="a JSON file, see above")
    add("--output", type=Path, default=Path("story.png"), metavar="PATH",
        help="a .png for the strip, or a folder for the strip and each picture (default story.png)")
    command.add_flags(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    command.execute(run, parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Read the story, encode each person once, draw every scene, save."""
    command.check(args)
    characters, scenes = read_story(args.story)
    prompts, casts = zip(*(write_prompt(scene["prompt"], characters) for scene in scenes), strict=True)
    sheet, files = command.plan_sheet(args.output, len(scenes))
    command.keep_photos(args, list(characters.values()), [sheet, *files])

    from layout import captioned, labelled, portrait, stack
    photos = read_photos(list(characters.values()))
    pipeline = command.load_pipeline(args)
    command.check_words(pipeline, prompts)
    features = {tuple(person.files): encode_person(pipeline, args.weights, person.files, pictures)
                for person, pictures in zip(characters.values(), photos, strict=True)}
    people = [make_subjects(pipeline, prompt, cast, [features[tuple(person.files)] for person in cast])
              for prompt, cast in zip(prompts, casts, strict=True)]
    seeds = [scene.get("seed", args.seed + k) for k, scene in enumerate(scenes)]
    print(f"seed {args.seed}", flush=True)
    images = list(command.draw(args, pipeline, prompts, seeds, people))

    portraits = [(portrait(pictures, images[0].size), name)
                 for name, pictures in zip(characters, photos, strict=True)]
    told = captioned(list(zip(images, prompts, strict=True)))
    command.save_sheet(stack([labelled(portraits, 5), told]), sheet,
                       {"prompt": "\n".join(prompts), **command.describe(args, list(characters.values()))},
                       images, files, [{**command.describe(args, cast), "prompt": prompt, "seed": seed}
                                       for prompt, cast, seed in zip(prompts, casts, seeds, strict=True)])


def read_story(path: Path) -> tuple[dict[str, Place], list[dict]]:
    """The characters by name, not yet in a prompt, and the scenes. Raises ValueError."""
    story = command.read_json(path, characters=dict, scenes=list)
    characters = {}
    for name, person in story["characters"].items():
        command.check_keys(f"{path}, character {name!r}", person, word=str, photos=list)
        characters[name] = Place(person["word"], 0, [str(path.parent / str(p)) for p in person["photos"]])
    for k, scene in enumerate(story["scenes"]):
        command.check_keys(f"{path}, scene {k}", scene, prompt=str)
        command.check_prompt(f"{path}, scene {k}: its prompt", scene["prompt"])
        command.check_seed(scene.get("seed", 0))
    return characters, story["scenes"]


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
