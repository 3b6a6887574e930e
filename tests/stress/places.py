"""The README's commands from odd places: another directory, names with spaces and letters of other scripts,
no HOME, a checkout that is read-only.

    python tests/stress/places.py

Exit status: 0 every command worked, 1 one did not.
"""
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = (
    "{code}/sample.py --subject '{photo}' --prompt 'a woman standing on the beach' --steps 2",
    "{code}/sample.py --subject 'woman={photo},{photo}' --prompt 'a woman waving' --steps 3 "
    "--save-routing 'Wege é.png' --output 'Bilder 图 1' --num 2",
    "{code}/sample.py --from-file {code}/examples/prompts.jsonl --output pictures --steps 2",
    "{code}/apps/swap.py --prompt 'a woman standing on the beach' --subjects '{photo}' --seeds 0 --steps 2",
    "{code}/apps/story.py {code}/examples/story.json --seed 0 --steps 2",
    "{code}/evaluate.py --count 2 --steps 3 --output 'évaluation 1'",
    "{code}/train.py vae --output 'runs é/vae 1' --samples 24 --steps 2 --batch-size 4",
    "{code}/weights/export_diffusers.py {code}/weights/toyworld --output 'export é'",
    "-m toyworld --output 'Welt é' --count 4",
    "-m data.build --check 'Welt é'",
)


def main() -> None:
    failures = 0
    with tempfile.TemporaryDirectory(prefix="Zoë’s 照片 ") as temporary:
        folder = Path(temporary)
        code, photo, here = folder / "the code", folder / "Zoë 1 照片.png", folder / "work here"
        shutil.copytree(ROOT, code, ignore=shutil.ignore_patterns(".git", ".cache", "runs", "__pycache__"))
        shutil.copy(code / "examples" / "zoe.png", photo)
        here.mkdir()
        shutil.copytree(code / "examples", here / "examples")  # which prompts.jsonl names
        for path in (*code.rglob("*"), code):
            path.chmod(0o555 if path.is_dir() else 0o444)
        before = sorted(code.rglob("*"))
        kept = {name: value for name, value in os.environ.items() if name not in ("HOME", "PYTHONPATH")}
        environment = {**kept, "PYTHONPATH": str(code), "OMP_NUM_THREADS": "1", "LC_ALL": "C",
                       "PYTHONDONTWRITEBYTECODE": "1"}
        print("command | status | what it said last", "---|---|---", sep="\n")
        for command in COMMANDS:
            words = [word.format(code=code, photo=photo) for word in shlex.split(command)]
            done = subprocess.run([sys.executable, *words], cwd=here, env=environment, check=False,
                                  capture_output=True, encoding="utf-8", errors="replace")
            failures += done.returncode != 0
            last = ((done.stderr if done.returncode else done.stdout).strip().splitlines() or [""])[-1]
            print(f"{command.replace('{code}/', '')} | {done.returncode} | {last[-90:]}", flush=True)
        changed = sorted(code.rglob("*")) != before
        for path in (code, *code.rglob("*")):
            path.chmod(0o755)
    print(f"{len(COMMANDS)} commands, {failures} failures; the checkout was {'' if changed else 'not '}"
          "changed")
    sys.exit(1 if failures or changed else 0)


if __name__ == "__main__":
    main()
