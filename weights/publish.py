"""Share a weights folder on the Hugging Face hub, with a model card.

    python weights/publish.py runs/sd15 user/name --license creativeml-openrail-m --dry-run shared
    hf auth login
    python weights/publish.py runs/sd15 user/name --license creativeml-openrail-m

The card says what the weights were made of and how, from config.json and moa.safetensors, and what they
reach, from evaluate.py's results.json. Others draw with --weights user/name. Only safetensors and config.json
go up, no checkpoints. --dry-run writes the same files to a folder and sends nothing.

Exit status: 0 shared or written, 2 an error (one line on stderr).
"""
import argparse
import json
import shutil
import sys
from pathlib import Path

from huggingface_hub import HfApi, ModelCard, ModelCardData
from safetensors import SafetensorError, safe_open

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from models.errors import Parser, fail, one_line
from models.load import read_config
from weights.hub import CARD, FILES

RUN = ("stage", "preset", "data", "weights", "code")
SETTINGS = ("steps", "batch_size", "lr", "warmup", "ema", "bf16", "augment", "max_people",
            "masked_probability", "subject_probability", "null_probability", "lambda_router",
            "lambda_object", "max_timestep")
SCORES = ("identity", "mixup", "locality", "context", "activity", "prior_context", "prior_activity")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("folder", type=Path, metavar="FOLDER", help="a weights folder, such as that of a train.py moa run")
    add("name", metavar="USER/NAME", help="of the repository, made where there is none")
    add("--license", required=True, metavar="NAME",
        help="as the hub spells it; that of the base model where it binds what is made of it")
    add("--base", metavar="NAME", help="the base model's name on the hub, for the card")
    add("--results", type=Path, metavar="FILE", help="results.json of evaluate.py on these weights")
    add("--private", action="store_true", help="only you can see the repository")
    add("--dry-run", type=Path, metavar="FOLDER", help="write card and files to a new folder, send nothing")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        files = [args.folder / name for name in FILES if (args.folder / name).is_file()]
        if args.folder / "config.json" not in files:
            raise ValueError(f"{args.folder} is no weights folder: it has no config.json")
        card = model_card(args)
        if args.dry_run:
            if args.dry_run.exists():
                raise ValueError(f"--dry-run {args.dry_run} exists already: give a new folder")
            args.dry_run.mkdir(parents=True)
            for file in files:
                shutil.copy(file, args.dry_run)
            card.save(args.dry_run / CARD)
            print(f"{args.dry_run}: {len(files)} files and {CARD}; nothing was sent")
            return
    except (OSError, ValueError, SafetensorError) as error:
        fail(error)
    try:
        hub = HfApi()
        hub.create_repo(args.name, private=args.private, exist_ok=True)
        hub.upload_folder(repo_id=args.name, folder_path=args.folder, allow_patterns=list(FILES))
        hub.upload_file(repo_id=args.name, path_in_repo=CARD, path_or_fileobj=str(card).encode())
    except Exception as error:  # the network library's own errors among them
        fail(f"{args.name} cannot be sent to the hub: {one_line(error)[:200]}. Is there a network, a token "
             "that may write (`hf auth login`), and is the user yours?")
    print(f"shared: python sample.py --weights {args.name} ...")


def model_card(args: argparse.Namespace) -> ModelCard:
    """The card of a weights folder. Raises ValueError and OSError."""
    data = ModelCardData(license=args.license, base_model=args.base, pipeline_tag="text-to-image",
                         tags=["mixture-of-attention", "personalization"])
    run = read_config(args.folder).get("training", {})
    settings = {**{name: run[name] for name in RUN if run.get(name)},
                **{name: value for name, value in preset_of(args.folder).items() if name in SETTINGS}}
    parts = [f"---\n{data.to_yaml()}\n---", f"# {args.name}",
             "Weights for Mixture-of-Attention (arXiv 2404.11565): a frozen text-to-image model with a "
             "personalized expert in each attention layer.",
             f"    python sample.py --weights {args.name} --subject me.jpg --prompt \"a man riding a bike\"",
             "## Training", table(("setting", "value"), settings.items())]
    if args.results:
        scores = json.loads(args.results.read_text(encoding="utf-8"))
        if "settings" not in scores:
            raise ValueError(f"{args.results} is no results.json of evaluate.py")
        rows = [(name, f"{scores[name]['mean']:.3f}") for name in SCORES if scores.get(name, {}).get("mean")]
        parts += ["## Scores", f"Of evaluate.py, {scores['settings']['count']} cases.",
                  table(("score", "value"), rows)]
    return ModelCard("\n\n".join(parts) + "\n")


def preset_of(folder: Path) -> dict:
    """The training settings that moa.safetensors holds; empty without one."""
    if not (folder / "moa.safetensors").is_file():
        return {}
    with safe_open(folder / "moa.safetensors", "pt") as file:
        return json.loads((file.metadata() or {}).get("moa", "{}")).get("settings", {}).get("preset", {})


def table(head: tuple[str, str], rows) -> str:
    return "\n".join(f"| {a} | {b} |" for a, b in (head, ("---", "---"), *rows))


if __name__ == "__main__":
    main()
