"""Feed bytes that reach new lines of code to what reads a stranger's files, with atheris.

    pip install atheris
    python tests/stress/guided.py pictures -max_total_time=600

The files, what reads them and what it may do are those of fuzz.py; what comes after the name is libFuzzer's.
A failure ends the run, and its bytes are in crash-pictures in the current folder.

Exit status: 0 no failures, 1 one, or atheris is not installed.
"""
import io
import os
import random
import sys
import tempfile
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
try:
    import atheris
except ImportError:
    sys.exit("error: atheris is not installed: pip install atheris")
with atheris.instrument_imports(include=["PIL", "models", "pictures", "pickletools", "safetensors", "weights",
                                         "zipfile"]):
    import torch
    from torch._weights_only_unpickler import Unpickler
    from safetensors.torch import save

    from tests.stress import fuzz
    from tests.test_hostile import pack

# What is fuzzed -> the family of fuzz.py, and whether the bytes are the pickle inside of an archive, which
# has checksums that no mutation of the whole file gets right.
TARGETS = {"safetensors": ("convert: safetensors", False), "files-of-torch": ("convert: pickles", False),
           "pickles": ("convert: pickles", True), "pictures": ("pictures", False), "masks": ("masks", False),
           "metadata": ("metadata of PNGs", False)}


def seeds(target: str, path: Path) -> list[bytes]:
    """Small valid files to begin with; `path` holds one of them."""
    state = {"encoder.conv_in.weight": torch.ones(2, 2), "decoder.conv_in.bias": torch.zeros(2).half()}
    if target == "safetensors":
        return [save(state), save(state, {"format": "pt"})]
    if target == "files-of-torch":
        files = [io.BytesIO(), io.BytesIO()]
        for zipped, file in enumerate(files):
            torch.save({"state_dict": state}, file, _use_new_zipfile_serialization=bool(zipped))
        return [file.getvalue() for file in files]
    if target == "pickles":
        return [pickled for pickled in fuzz.PICKLES if len(pickled) < 1000]
    return [path.read_bytes()] if target == "metadata" else list(fuzz.picture_files().values())


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(f"error: give one of {', '.join(TARGETS)}, and flags of libFuzzer")
    target = sys.argv.pop(1)
    (make, errors), inside = fuzz.FAMILIES[TARGETS[target][0]], TARGETS[target][1]
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    fuzz.spare()
    atheris.instrument_func(Unpickler.load)  # all of torch would take minutes
    with tempfile.TemporaryDirectory(prefix="guided-") as temporary:
        folder, corpus = Path(temporary), Path(temporary) / "corpus"
        read = make(folder)(random.Random(0))  # which reads the same file each time
        path = Path(read.args[0])
        corpus.mkdir()
        for number, data in enumerate(seeds(target, folder / "x.png")):
            (corpus / str(number)).write_bytes(data)
        if child := os.fork():  # libFuzzer ends its process without a word to Python
            sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0)
        fuzz.limit()

        def try_one(data: bytes) -> None:
            if inside:
                pack(path, data)
            else:
                fuzz.put(path, data)
            outcome = fuzz.attempt(read, errors)
            if outcome not in ("taken", "refused"):
                Path(f"crash-{target}").write_bytes(data)
                print(f"{outcome}: see crash-{target}", flush=True)
                os._exit(1)

        atheris.Setup([sys.argv[0], "-print_final_stats=1", "-rss_limit_mb=0", *sys.argv[1:], str(corpus)],
                      try_one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
