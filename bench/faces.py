"""Measure real weights as the paper's Table 3 does: FastComposer's subjects and prompts, FaceNet and CLIP.

    python -m bench.faces --weights weights/sd15 --subjects celeba_test_single --output runs/faces \\
        --facenet 20180402-114759-vggface2.pt --clip clip-vit-large-patch14
    torchrun --nproc-per-node 8 -m bench.faces ... --multi --output runs/faces_multi

--subjects has a folder per person with a photo, the first by name. FastComposer's 15 are known; for others
write `{"folder": "woman", ...}` to subjects.json beside the folders. Each is drawn 4 times with each of 40
prompts, with --multi each pair with each of 21. IP says how similar the faces are to those of the photos, PC
how well the picture shows its prompt. The command can be given again after a stop: what is drawn and scored
is left alone. Processes of `torchrun` share the pictures, and need one --output for all.

FastComposer seeds once for all pictures; here each has its own, --seed + its number, so that a picture does
not depend on those before it. Nothing is downloaded. docs/results.md has more.
"""
import argparse
import json
import time
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import sample
from bench.face_scores import Networks, identity_score, load_networks, prompt_score
from bench.table3 import IMAGES, MULTI, SINGLE, SUBJECTS, TABLE3
from evaluate import checksum, device_name
from images import read_picture, read_settings, to_images
from models.device import pick_device
from models.load import read_json, write_json, write_whole
from subjects import PEOPLE, bind_subjects
from train import git_describe


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = sample.Parser(__doc__)
    add = parser.add_argument
    add("--subjects", type=Path, required=True, metavar="FOLDER", help="a folder per person, see above")
    add("--output", type=Path, required=True, metavar="FOLDER", help="for pictures, scores and results")
    add("--multi", action="store_true", help="two people in each picture")
    add("--facenet", type=Path, metavar="FILE", help="facenet-pytorch's weights of vggface2")
    add("--clip", type=Path, metavar="PATH",
        help="OpenAI's CLIP ViT-L/14: a file or folder in open_clip's or transformers' layout")
    add("--prior-only", action="store_true", help="draw with the base model: what the scores are by chance")
    for name, what in (("subjects", "subjects"), ("prompts", "prompts of each kind"),
                       ("images", f"of the {IMAGES} images of a prompt")):
        add(f"--max-{name}", type=int, metavar="N", help=f"to try: the first N {what} only")
    sample.add_flags(parser, seed=42, steps=50, guidance_scale=5.0)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    sample.execute(run, parse_args(argv))


@torch.no_grad()
def run(args: argparse.Namespace) -> None:
    """Check everything, draw this process's pictures, score them; the first process writes the table."""
    changed = changed_settings(args)  # before what they leave open is filled in
    check(args)
    cases = plan(args, read_subjects(args.subjects))
    device = pick_device(args.device)
    networks = load_networks(args.facenet, args.clip, device)
    references = read_references(networks, {person for case in cases for person in case.people})
    args.any_subject = True  # the protocol's people are others than those of the training
    pipeline = sample.load(args, people=True)
    files = claim(args, networks)
    mine = sample.own_share(cases)
    sample.draw_lines(args, pipeline, {case.picture: to_line(case) for case in mine})
    del pipeline
    score(mine, networks, references)
    if cases[0] in mine:  # this is the first process
        source = {"code": git_describe(), "torch": torch.__version__, "device": device_name(device),
                  "sha256": files}
        if not networks.as_paper:
            changed.append("another CLIP")
        write_results(args, cases, gather(args, cases), source, changed)


# What may differ and the pictures' scores still be compared with Table 3.
FREE = ("subjects", "output", "multi", "facenet", "clip", "weights", "moa", "device", "dtype", "checker",
        "any_subject")


def changed_settings(args: argparse.Namespace) -> list[str]:
    """The flags that are not as in the protocol, the people apart."""
    protocol = vars(parse_args(["--subjects", "", "--output", ""]))
    return [f"--{name.replace('_', '-')}" + (f" {value}" if value is not True else "")
            for name, value in vars(args).items() if name not in FREE and value != protocol[name]]


def check(args: argparse.Namespace) -> None:
    """Raise ValueError for the first setting that cannot be used."""
    sample.check(args)
    for flag, path, what in (
            ("--facenet", args.facenet, "facenet-pytorch's vggface2 weights, 20180402-114759-vggface2.pt of "
                                        "github.com/timesler/facenet-pytorch's releases"),
            ("--clip", args.clip, "CLIP ViT-L/14, as openai/clip-vit-large-patch14 on Hugging Face")):
        if path is None:
            raise ValueError(f"{flag} is missing: give {what}")
        if not path.exists():
            raise ValueError(f"{flag} {path} does not exist: give {what}")
    sample.check_writable("--output", args.output / "results.json")


# --- who and what ---


@dataclass(frozen=True)
class Person:
    """A subject of the protocol."""

    name: str
    noun: str
    photo: Path


@dataclass(frozen=True)
class Case:
    """A picture of the protocol."""

    people: tuple[Person, ...]
    kind: str  # of the prompt
    prompt: str
    seed: int
    picture: Path
    scores: Path  # where its scores are kept


def read_subjects(folder: Path) -> list[Person | None]:
    """The people in the order of the protocol, None where one of FastComposer's is not there.

    Raises ValueError.
    """
    if not folder.is_dir():
        raise ValueError(f"--subjects {folder} is not a folder: give one with a folder per person")
    table = folder / "subjects.json"
    nouns = read_json(table) if table.exists() else SUBJECTS
    there = sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")
    if not isinstance(nouns, dict) or not all(noun in PEOPLE for noun in nouns.values()):
        raise ValueError(f'{table} must say what to call each person, as {{"anna": "woman"}}, with one of '
                         f"the words {', '.join(PEOPLE)}")
    for name in there:
        if name not in nouns:
            raise ValueError(f"{folder / name} is not a known subject: write what to call each person, "
                             f'as {{"{name}": "woman"}}, to {table}')
    if missing := [name for name in sorted(nouns) if table.exists() and name not in there]:
        raise ValueError(f"{table} names {missing[0]}, but there is no folder {folder / missing[0]}")
    return [Person(name, nouns[name], first_photo(folder / name)) if name in there else None
            for name in sorted(nouns)]


def first_photo(folder: Path) -> Path:
    """The first picture of a folder by name. Raises ValueError."""
    photos = sorted(p for p in folder.iterdir() if p.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp"))
    if not photos:
        raise ValueError(f"{folder} has no .jpg, .jpeg, .png or .webp: put the person's photo there")
    return photos[0]


def plan(args: argparse.Namespace, people: list[Person | None]) -> list[Case]:
    """The pictures to draw, in order. Names and seeds do not depend on who is left out. Raises ValueError."""
    prompts = [(kind, prompt, k) for kind, prompts in (MULTI if args.multi else SINGLE).items()
               for k, prompt in enumerate(prompts)]
    wanted = [person for person in people if person][:args.max_subjects]
    groups = list(combinations(people, 2 if args.multi else 1))
    cases = []
    for g, group in enumerate(groups):
        if not set(group) <= set(wanted):
            continue
        who = " and ".join(f"a {person.noun}" for person in group)
        for p, (kind, prompt, place) in enumerate(prompts):
            for i in range(min(IMAGES, args.max_images or IMAGES)):
                if place < (args.max_prompts or len(prompts)):
                    name = f"subject_{g:04d}_prompt_{p:04d}_instance_{i:04d}"
                    cases.append(Case(group, kind, prompt.format(who),
                                      args.seed + (g * len(prompts) + p) * IMAGES + i,
                                      args.output / "pictures" / f"{name}.png",
                                      args.output / "scores" / f"{name}.json"))
    if not cases:
        raise ValueError(f"--subjects {args.subjects} has {len(wanted)} people: "
                         "put a folder with a photo in it for each person, --multi needs two")
    return cases


def to_line(case: Case) -> sample.Line:
    """What `sample.draw_lines` takes."""
    return sample.Line(case.picture.name, case.prompt, case.seed, [
        f"{k}={person.photo}" for k, person in enumerate(case.people, 1)])


def read_references(networks: Networks, people: set[Person]) -> dict[Person, Tensor]:
    """The embedding (E,) of the face in each person's photo. Raises ValueError naming a photo without."""
    found = {}
    for person in sorted(people, key=lambda person: person.name):
        found[person] = networks.reference(to_images(read_picture(person.photo)[None] * 2 - 1)[0])
        if found[person] is None:
            raise ValueError(f"{person.photo}: no face is found in it, and there is nothing to compare with: "
                             "give another photo")
    return found


def claim(args: argparse.Namespace, networks: Networks) -> dict[str, str]:
    """Note in --output which weights its pictures are drawn and scored with: their checksums, by name.

    Raises ValueError if what lies there is by others.
    """
    parts = {part: args.weights / f"{part}.safetensors" for part in
             ("unet", "vae", "text_encoder", "image_encoder")}
    files = {name: checksum(file) for name, file in {**parts, "moa": args.moa}.items()
             if file and file.is_file()} | networks.files
    note, mine = args.output / "run.json", {"protocol": "multi" if args.multi else "single", **files}
    found = read_json(note) if note.exists() else mine
    if wrong := [name for name in {**mine, **found} if mine.get(name) != found.get(name)]:
        raise ValueError(f"--output {args.output} has pictures of another run, with another "
                         f"{' and '.join(wrong)}: give another folder")
    args.output.mkdir(parents=True, exist_ok=True)
    write_json(mine, note)
    return files


# --- scoring ---


def score(cases: list[Case], networks: Networks, references: dict[Person, Tensor]) -> None:
    """Score the pictures that have no scores yet; each picture's are written as soon as they are there."""
    for case in tqdm(cases, "scoring", unit="picture", disable=None):
        if read_score(case):
            continue
        with Image.open(case.picture) as image:
            picture = image.convert("RGB")
        faces = networks.detect(picture)
        known = torch.stack([references[person] for person in case.people])
        case.scores.parent.mkdir(exist_ok=True)
        write_json({"ip": identity_score(faces, known, networks.embed),
                    "pc": prompt_score(networks, picture, case.prompt),
                    "faces": 0 if faces is None else len(faces), "of": checksum(case.picture)}, case.scores)


def read_score(case: Case) -> dict | None:
    """The scores that are kept of a picture, None if there are none, or of an older one."""
    if not case.picture.exists() or not case.scores.exists():
        return None
    kept = json.loads(case.scores.read_text(encoding="utf-8"))
    return kept if kept["of"] == checksum(case.picture) else None


def gather(args: argparse.Namespace, cases: list[Case]) -> list[dict]:
    """The scores of all pictures; waits for those of the other processes, whose end would end this one."""
    scores = []
    for case in cases:
        line = to_line(case)
        line.subjects = [] if args.prior_only else bind_subjects(line.prompt, line.subject)
        settings = sample.line_settings(args, line)
        # An older picture, and its score, may lie there until the process that it belongs to comes to it.
        while read_settings(case.picture) != settings or not (found := read_score(case)):
            time.sleep(1)
        scores.append(found)
    return scores


# --- what is written ---


def write_results(args: argparse.Namespace, cases: list[Case], scores: list[dict], source: dict,
                  changed: list[str]) -> None:
    """results.json, results.md and the table on stdout. changed: what is not as in the protocol."""
    kinds = {kind: [s for case, s in zip(cases, scores, strict=True) if case.kind == kind]
             for kind in dict.fromkeys(case.kind for case in cases)}
    people = {person.name: person.noun for case in cases for person in case.people}
    if people != SUBJECTS:
        changed = [*changed, "other subjects"]
    results = {
        "protocol": "multi" if args.multi else "single", "changed": changed, "subjects": len(people),
        "settings": sample.settings_of(args, [], prior_only=args.prior_only), "run": source,
        "scores": {name: summary(found) for name, found in {**kinds, "all": scores}.items()},
        "table3": {name: {"ip": ip, "pc": pc} for name, (ip, pc) in TABLE3.items()},
        "pictures": {case.picture.name: {"prompt": case.prompt, "people": [one.name for one in case.people],
                                         **{name: found[name] for name in ("ip", "pc", "faces")}}
                     for case, found in zip(cases, scores, strict=True)}}
    text = table(results)
    write_json(results, args.output / "results.json")
    write_whole(args.output / "results.md", lambda file: file.write_text(text, encoding="utf-8"))
    print(text)


def summary(scores: list[dict]) -> dict:
    """Means and standard deviations over pictures, and the share of them without a face."""
    ip, pc, faces = (np.array([s[name] for s in scores], float) for name in ("ip", "pc", "faces"))
    return {"ip": ip.mean(), "ip_std": ip.std(), "pc": pc.mean(), "pc_std": pc.std(),
            "no_face": (faces == 0).mean(), "n": len(scores)}


def table(results: dict) -> str:
    """The scores of each kind of prompt and, for one person in a picture, beside the paper's Table 3."""
    lines = ["| prompts | IP | std | PC | std | no face | n |", "|---|---|---|---|---|---|---|"]
    lines += [f"| {name} | {s['ip']:.3f} | {s['ip_std']:.3f} | {s['pc']:.3f} | {s['pc_std']:.3f} | "
              f"{s['no_face']:.3f} | {s['n']} |" for name, s in results["scores"].items()]
    if results["protocol"] == "single":
        rows = {**results["table3"], "this run": results["scores"]["all"]}
        lines += ["", "| Table 3 | IP | PC |", "|---|---|---|"]
        lines += [f"| {name} | {row['ip']:.3f} | {row['pc']:.3f} |" for name, row in rows.items()]
    if results["changed"]:
        lines += ["", f"Not the protocol ({', '.join(results['changed'])}): {results['subjects']} subjects, "
                  f"{results['scores']['all']['n']} pictures. Do not compare."]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
