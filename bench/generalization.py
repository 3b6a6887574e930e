"""How far does MoA carry over to what it was not trained on, and through what covers a person?

    python -m bench.generalization --output runs/generalization
    python -m bench.generalization --output runs/unseen --weights runs/ablations/unseen-pairs/seed-0

Small world only. Five groups of cases are drawn: people of training's pictures or new ones, in pairs of
activity and place that training drew or never did, and new people with a pair of attributes
(`ablate.UNSEEN`) that the ablation `unseen-pairs` never shows. Four tables, each with 95 % intervals over
pictures, printed and in generalization.json: the scores of evaluate.py for each group; what MoA costs of the
activity in known and in new scenes, picture by picture against the prior; how often both attributes
of such a pair are read right, beside the same two attributes of people with other pairs; and attributes
read right against the share of a person that is covered by things and other people, with the judge's own
reading of renders of the same scenes. That share is the render's: of a generated picture it is not known.
generalization.json says besides by which code, weights and settings it was made.
"""
import argparse
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from itertools import pairwise, product
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import command
import evaluate
from ablate import UNSEEN, has_unseen_pair
import toyworld
from toyworld.pen import Pen

# Group -> (people of training's pictures, pairs of activity and place that training never drew, pairs of
# UNSEEN).
GROUPS = {"training's people, known scenes": (True, False, False),
          "new people, known scenes": (False, False, False),
          "training's people, new scenes": (True, True, False),
          "new people, new scenes": (False, True, False),
          "new people with a pair of `unseen-pairs`": (False, False, True)}
SCORES = {"identity": evaluate.identity, "mixup": evaluate.mixup, "activity": evaluate.activity_right,
          "context": evaluate.context_right}
SHOWN = 32_000  # scenes that MoA's training draws, those of the first seeds
COVERED = (0.0, 0.01, 0.08, 0.18, 1.0)  # edges of the shares of a person that is covered


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", required=True, type=Path, metavar="FOLDER", help="folder for generalization.json")
    add("--weights", type=Path, default=evaluate.SHIPPED, metavar="FOLDER", help="default: the small world's")
    add("--count", type=int, default=96, metavar="N", help="cases in each group (default 96)")
    add("--steps", type=int, default=20, metavar="N", help="sampling steps (default 20)")
    add("--prior-above", type=int, metavar="T",
        help="the base model draws alone at timesteps from T on (default: the weights', or 800)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ... (default auto)")
    parser.set_defaults(moa=None, judge=None, guidance_scale=None, first=0, start=evaluate.START, sparse=0.0)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    command.execute(run, parse_args(argv))


def run(args: argparse.Namespace) -> None:
    from models.load import write_json
    evaluate.fill_in(args)
    evaluate.check(args)
    pipeline, judge, files = evaluate.load(args)
    options = {"steps": args.steps, "guidance_scale": args.guidance_scale, "prior_above": args.prior_above}
    source = evaluate.source(pipeline.device, files)
    scenes = {group: [cast(group, number) for number in range(args.count)] for group in GROUPS}
    drawn = {group: draw(pipeline, judge, cases, options) for group, cases in scenes.items()}
    prior = {group: draw(pipeline, judge, cases, {**options, "prior_only": True})
             for group, cases in scenes.items()}
    rendered = {group: [reading for part in batches(cases) for reading in read_renders(judge, part)]
                for group, cases in scenes.items()}
    tables = {"groups": {group: {**scores(scenes[group], drawn[group], SCORES),
                                 **{f"prior's {name}": interval for name, interval in
                                    scores(scenes[group], prior[group], ("activity", "context")).items()}}
                         for group in GROUPS},
              "scenes": by_scene(scenes, drawn, prior),
              "pairs": pairs_right(scenes, drawn), "covered": by_cover(scenes, drawn, rendered)}
    write_json({"settings": {"count": args.count, **options}, "run": source, **tables},
               args.output / "generalization.json")
    for table in tables.values():
        print(markdown(table), end="\n\n")


def cast(group: str, number: int) -> toyworld.Scene:
    """Case `number` of a group: one person in even ones, two in odd ones. No two cases share anything."""
    shown, new_scene, unseen = GROUPS[group]
    place = list(GROUPS).index(group)
    rng = np.random.default_rng([number, place, 20240417])
    count = 1 + number % 2
    activities = toyworld.ONE_PERSON if count == 1 else toyworld.TWO_PERSON
    plans = [plan for plan in product(activities, toyworld.CONTEXTS)
             if (plan in toyworld.HELD_OUT) == new_scene]
    activity, context = plans[rng.integers(len(plans))]
    people = []
    while len(people) < count:
        found = someone_shown(rng) if shown else toyworld.sample_identity(rng, "test")
        if has_unseen_pair(found) == unseen:
            people.append(found)
    return toyworld.compose_scene(9_000_000 + 100_000 * place + number, people, activity, context)


def someone_shown(rng: np.random.Generator) -> toyworld.Identity:
    """Somebody of a scene that training draws, also the one of `unseen-pairs`. That an identity is none of
    the test split is not enough: there are so many that most of the others are in no picture."""
    while True:
        people = [subject.identity for subject in toyworld.sample_scene(int(rng.integers(SHOWN))).subjects]
        if not any(map(has_unseen_pair, people)):
            return people[rng.integers(len(people))]


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


def by_scene(scenes: dict, drawn: dict, prior: dict) -> dict:
    """Activities right in all groups of known and of new scenes, beside the prior's pictures of the same
    cases; the difference is a mean over cases."""
    found = {}
    for name, new in (("known scenes", False), ("new scenes", True)):
        cases = [case for group, (_, new_scene, _) in GROUPS.items() if new_scene == new
                 for case in zip(scenes[group], drawn[group], prior[group], strict=True)]
        with_moa = [evaluate.activity_right(scene, reading) for scene, reading, _ in cases]
        alone = [evaluate.activity_right(scene, reading) for scene, _, reading in cases]
        found[name] = {"activity": evaluate.interval(with_moa), "prior's activity": evaluate.interval(alone),
                       "difference": evaluate.interval([float(ours) - float(its) for ours, its
                                                        in zip(with_moa, alone, strict=True)])}
    return found


def read_renders(judge, scenes: list[toyworld.Scene]) -> list[evaluate.Reading]:
    """What the judge reads of the renderer's own pictures."""
    from images import to_picture
    images = np.stack([toyworld.render_scene(scene)[0] for scene in scenes])
    return evaluate.read(judge, to_picture(images).to(next(judge.parameters()).device))


def pairs_right(scenes: dict, drawn: dict) -> dict:
    """Shares of people of whom both attributes of a pair are read right, a mean over pictures, for those who
    have it and for new people in known scenes who do not."""
    *_, having = GROUPS
    others = "new people, known scenes"
    found = {}
    for pair in UNSEEN:
        names = [name for name, _ in pair]
        for who, group in (("those who have it", having), ("others", others)):
            rights = [(picture, all(hits[name] for name in names))
                      for picture, person, hits in people_of(scenes[group], drawn[group])
                      if set(names) <= set(hits)
                      and (who == "others" or all(getattr(person, n) == v for n, v in pair))]
            label = " and ".join(f"{name} {value}" for name, value in pair)
            found[f"{label}: {who}"] = {"both right": by_picture(rights)}
    return found


def by_cover(scenes: dict, drawn: dict, rendered: dict) -> dict:
    """Attributes read right, by the share of a person that is covered in the render; means over pictures."""
    shares, right = [], {"attributes right": [], "in renders": []}
    for group, cases in scenes.items():
        shares += [share for scene in cases for share in covered(scene)]
        for name, readings in (("attributes right", drawn), ("in renders", rendered)):
            right[name] += [((group, picture), np.mean(list(hits.values())))
                            for picture, _, hits in people_of(cases, readings[group])]
    return {f"{low:.0%} to {high:.0%} covered": {
        name: by_picture(value for share, value in zip(shares, values, strict=True) if low <= share < high)
        for name, values in right.items()} for low, high in pairwise(COVERED)}


def by_picture(values: Iterable[tuple]) -> dict:
    """The interval of (picture, value of a person): two people of one picture are not independent. Of yes and
    no it is Wilson's, of as many as there are pictures."""
    pictures = defaultdict(list)
    for picture, value in values:
        pictures[picture].append(value)
    yes_or_no = all(isinstance(value, bool) for several in pictures.values() for value in several)
    return evaluate.interval([np.mean(several) for several in pictures.values()], yes_or_no=yes_or_no)


def people_of(scenes: list[toyworld.Scene], readings: list[evaluate.Reading]) -> list[tuple]:
    """(case, identity, {visible attribute: read right}) of everybody, case by case, from the left."""
    found = []
    for case, (scene, reading) in enumerate(zip(scenes, readings, strict=True)):
        hits = evaluate.attribute_hits(scene, reading)
        found += [(case, subject.identity, {name: right for at, name, right in hits if at == place})
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
    """Rows of {column: interval}; n is the pictures of a row, and beside a score of those that have it."""
    columns = list(next(iter(table.values())))
    lines = ["| | " + " | ".join(columns) + " | n |", "|---" * (2 + len(columns)) + "|"]
    for name, row in table.items():
        count = max(value["n"] for value in row.values())
        cells = [evaluate.cell(value) + (f", n {value['n']}" if value["n"] < count else "")
                 for value in row.values()]
        lines.append(f"| {name} | {' | '.join(cells)} | {count} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
