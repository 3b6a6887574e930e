"""How far does MoA carry over to what it was not trained on, and through what covers a person?

    python bench/generalization.py --output runs/generalization
    python bench/generalization.py --output runs/unseen --weights runs/ablations/unseen-pairs/seed-0

Small world only. Five groups of cases are drawn: people of training or new ones, in pairs of activity and
place that training drew or never did, and new people with a pair of attributes (`ablate.UNSEEN`) that the
ablation `unseen-pairs` never shows. Three tables, each with 95 % intervals, printed and in results.json:
the scores of evaluate.py for each group; how often both attributes of such a pair are read right, beside
the same two attributes of people with other pairs; and attributes read right against the share of a
person that is covered by things and other people, with the judge's own reading of renders of the same
scenes. That share is the render's: of a generated picture it is not known.
"""
import argparse
import sys
from collections.abc import Callable, Iterable
from itertools import pairwise, product
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import command
import evaluate
from ablate import UNSEEN, has_unseen_pair
from data import toyworld
from data.toyworld.pen import Pen

# Group -> (split of the people, pairs of activity and place that training never drew, pairs of UNSEEN).
GROUPS = {"training's people, known scenes": ("train", False, False),
          "new people, known scenes": ("test", False, False),
          "training's people, new scenes": ("train", True, False),
          "new people, new scenes": ("test", True, False),
          "new people with a pair of `unseen-pairs`": ("test", False, True)}
SCORES = {"identity": evaluate.identity, "mixup": evaluate.mixup, "activity": evaluate.activity_right,
          "context": evaluate.context_right}
COVERED = (0.0, 0.01, 0.08, 0.18, 1.0)  # edges of the shares of a person that is covered


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", required=True, type=Path, metavar="FOLDER", help="folder for results.json")
    add("--weights", type=Path, default=evaluate.SHIPPED, metavar="FOLDER", help="default: the small world's")
    add("--count", type=int, default=96, metavar="N", help="cases in each group (default 96)")
    add("--steps", type=int, default=20, metavar="N", help="sampling steps (default 20)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ... (default auto)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    command.execute(run, parse_args(argv))


def run(args: argparse.Namespace) -> None:
    from models.load import read_config, write_json
    args.output.mkdir(parents=True, exist_ok=True)
    args.moa = args.judge = None
    pipeline, judge, _ = evaluate.load(args)
    options = {"steps": args.steps, "guidance_scale": read_config(args.weights)["sampling"]["guidance_scale"]}
    scenes = {group: [cast(n, *kind) for n in range(args.count)] for group, kind in GROUPS.items()}
    drawn = {group: draw(pipeline, judge, cases, options) for group, cases in scenes.items()}
    prior = {group: draw(pipeline, judge, cases, {**options, "prior_only": True})
             for group, cases in scenes.items()}
    rendered = {group: [reading for part in batches(cases) for reading in read_renders(judge, part)]
                for group, cases in scenes.items()}
    results = {"groups": {group: {**scores(scenes[group], drawn[group], SCORES),
                                  **{f"prior's {name}": interval for name, interval in
                                     scores(scenes[group], prior[group], ("activity", "context")).items()}}
                          for group in GROUPS},
               "pairs": pairs_right(scenes, drawn), "covered": by_cover(scenes, drawn, rendered)}
    write_json(results, args.output / "results.json")
    for table in results.values():
        print(markdown(table), end="\n\n")


def cast(number: int, split: str, new_scene: bool, unseen: bool) -> toyworld.Scene:
    """Case `number` of a group: one person in even ones, two in odd ones."""
    rng = np.random.default_rng([number, 20240417])
    count = 1 + number % 2
    activities = toyworld.ONE_PERSON if count == 1 else toyworld.TWO_PERSON
    plans = [plan for plan in product(activities, toyworld.CONTEXTS)
             if (plan in toyworld.HELD_OUT) == new_scene]
    activity, context = plans[rng.integers(len(plans))]
    people = []
    while len(people) < count:
        person = toyworld.sample_identity(rng, split)
        if has_unseen_pair(person) == unseen:
            people.append(person)
    return toyworld.compose_scene(9_000_000 + number, people, activity, context)


def batches(items: list) -> list[list]:
    return [items[start:start + evaluate.BATCH] for start in range(0, len(items), evaluate.BATCH)]


def draw(pipeline, judge, scenes: list[toyworld.Scene], options: dict) -> list[evaluate.Reading]:
    """What the judge reads of each scene, drawn with its people."""
    from tqdm import tqdm
    readings = []
    for part in tqdm(batches(scenes), "drawing", unit="batch", disable=None):
        people = [evaluate.subjects_of(pipeline, scene, evaluate.references_of(scene, scene.seed, 0))
                  for scene in part]
        pictures = pipeline.generate([s.caption for s in part], [s.seed for s in part], people, **options)
        readings += evaluate.read(judge, pictures.to(pipeline.device))
    return readings


def scores(scenes: list[toyworld.Scene], readings: list[evaluate.Reading], names: Iterable[str]) -> dict:
    """Name -> interval of that score over the cases."""
    return {name: evaluate.interval([SCORES[name](*case) for case in zip(scenes, readings, strict=True)])
            for name in names}


def read_renders(judge, scenes: list[toyworld.Scene]) -> list[evaluate.Reading]:
    """What the judge reads of the renderer's own pictures."""
    from pictures import to_picture
    images = np.stack([toyworld.render_scene(scene)[0] for scene in scenes])
    return evaluate.read(judge, to_picture(images).to(next(judge.parameters()).device))


def pairs_right(scenes: dict, drawn: dict) -> dict:
    """Shares of people of whom both attributes of a pair are read right, for those who have it and for
    new people in known scenes who do not."""
    *_, having = GROUPS
    others = "new people, known scenes"
    found = {}
    for pair in UNSEEN:
        names = [name for name, _ in pair]
        for who, group in (("those who have it", having), ("others", others)):
            rights = [all(hits[name] for name in names)
                      for person, hits in people_of(scenes[group], drawn[group]) if set(names) <= set(hits)
                      and (who == "others" or all(getattr(person, n) == v for n, v in pair))]
            label = " and ".join(f"{name} {value}" for name, value in pair)
            found[f"{label}: {who}"] = {"both right": evaluate.interval(rights)}
    return found


def by_cover(scenes: dict, drawn: dict, rendered: dict) -> dict:
    """Attributes read right per person, by the share of the person that is covered in the render."""
    shares, right = [], {"attributes right": [], "in renders": []}
    for group, cases in scenes.items():
        shares += [share for scene in cases for share in covered(scene)]
        for name, readings in (("attributes right", drawn), ("in renders", rendered)):
            right[name] += [np.mean(list(hits.values())) for _, hits in people_of(cases, readings[group])]
    shares = np.array(shares)
    table = {}
    for low, high in pairwise(COVERED):
        inside = (shares >= low) & (shares < high)
        table[f"{low:.0%} to {high:.0%} covered"] = {
            name: evaluate.interval(np.array(values)[inside]) for name, values in right.items()}
    return table


def people_of(scenes: list[toyworld.Scene], readings: list[evaluate.Reading]) -> list[tuple]:
    """(identity, {visible attribute: read right}) of everybody, case by case, from the left."""
    found = []
    for scene, reading in zip(scenes, readings, strict=True):
        hits = evaluate.attribute_hits(scene, reading)
        found += [(subject.identity, {name: right for at, name, right in hits if at == place})
                  for place, subject in enumerate(scene.subjects)]
    return found


def covered(scene: toyworld.Scene) -> list[float]:
    """Share of each person's silhouette that something else covers in the render."""
    _, visible = toyworld.render_scene(scene)
    shares = []
    for place, mask in enumerate(visible):
        silhouette = render_silhouettes(scene, lambda label, wanted=place + 1: label == wanted)[place]
        shares.append(1 - mask.sum() / max(silhouette.sum(), 1))
    return shares


def render_silhouettes(scene: toyworld.Scene, counts: Callable[[int], bool]) -> np.ndarray:
    """(P, S, S): the people's masks where only shapes whose label `counts` can cover anything."""
    from ablate import replaced
    each = Pen._each

    def surfaces(pen, color):
        found = each(pen, color)
        return found if counts(pen.label) else found[:1]

    with replaced(Pen, "_each", surfaces):
        return toyworld.render_scene(scene)[1]


def markdown(table: dict) -> str:
    """Rows of {column: interval}."""
    columns = list(next(iter(table.values())))
    lines = ["| | " + " | ".join(columns) + " | n |", "|---" * (2 + len(columns)) + "|"]
    for name, row in table.items():
        cells = [f"{v['mean']:.3f} ({v['low']:.3f} to {v['high']:.3f})" if v["n"] else "-"
                 for v in row.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {next(iter(row.values()))['n']} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
