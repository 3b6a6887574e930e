"""What strangers send: bombs, lies and links; and what no file may use."""
import ast
import json
import resource
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from data.fastcomposer import DataError
from data.files import open_picture
from models import WeightsError
from models.load import MOST_LAYERS, build_empty, read_checkpoint, read_tensors, write_whole
from models.vae import VAEConfig
from moa import add_moa, load_moa
from moa import write_moa
from images import read_settings
from weights.checkpoints import Notes, Refusal
from weights.parts import open_part

ROOT = Path(__file__).parents[1]
SOURCES = [path for path in sorted(ROOT.rglob("*.py")) if not {".cache", "runs", "tests"} & set(path.parts)]
# Calls that run what they read, and arguments without which others do.
NEVER = {"eval", "exec", "pickle.load", "pickle.loads", "yaml.load", "os.system", "os.popen", "shelve.open",
         "marshal.loads", "joblib.load", "__import__"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_that_is_read_is_run(path):
    for call in (node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call)):
        name, given = ast.unparse(call.func), {word.arg: ast.unparse(word.value) for word in call.keywords}
        where = f"{path.name}:{call.lineno}: {name}"
        assert name not in NEVER, where
        assert given.get("shell", "False") == "False", where
        if name == "torch.load":
            assert given.get("weights_only") == "True", where
        if name.split(".")[-1] == "load" and name.startswith(("np.", "numpy.")):
            assert given.get("allow_pickle", "False") == "False", where  # which is numpy's default


# Bombs -------------------------------------------------------------------------------------------

def pack(path: Path, pickled: bytes, compression: int = zipfile.ZIP_STORED) -> Path:
    """A file as torch writes it around any pickle."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")
    return path


def test_an_archive_that_unpacks_to_more_than_it_is(tmp_path):
    path = pack(tmp_path / "x.ckpt", b"\x80\x02" + b"N" * 10_000_000 + b".", zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 100_000
    with pytest.raises(WeightsError, match="would unpack to 10000"):
        read_checkpoint(path)
    with pytest.raises(Refusal, match="would unpack to 10000"):
        open_part(str(path), "vae", "off", Notes())


def test_dictionaries_that_hold_each_other(tmp_path):
    """29 of them, each twice in the next, would be half a billion; and one that holds itself."""
    grown = b"\x80\x02}q\0" + b"".join(
        b"}q%c(X\1\0\0\0ah%cX\1\0\0\0bh%cu" % (k, k - 1, k - 1) for k in range(1, 30)) + b"."
    for pickled in (grown, b"\x80\x02}q\0X\1\0\0\0ah\0s."):
        with pytest.raises(Refusal, match="no named tensors"):
            open_part(str(pack(tmp_path / "x.ckpt", pickled)), "vae", "off", Notes())


@pytest.mark.parametrize("header", [
    b'{"x":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}',
    b'{"x":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,0]}}'])
@pytest.mark.parametrize("length", [None, 2 ** 62])
def test_headers_that_claim_terabytes(header, length, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes((length or len(header)).to_bytes(8, "little") + header)
    with pytest.raises(WeightsError, match="is truncated|is damaged"):
        read_tensors(path)


def test_sizes_that_claim_any_number_of_layers():
    for cfg in (VAEConfig(layers=10 ** 9), VAEConfig(channels=(32,) * (MOST_LAYERS + 1))):
        with pytest.raises(WeightsError, match=f"more than {MOST_LAYERS}"):
            build_empty(cfg)


@pytest.mark.parametrize("change", [{"prompt": {"text_dim": 16, "image_dim": 16, "hidden": 10 ** 6}},
                                    {"router_hidden": 10 ** 6}])
def test_a_moa_file_that_claims_other_sizes_than_it_has(change, tmp_path, world):
    from models.load import load_part
    from moa import read_moa
    config, state = read_moa(world / "moa.safetensors")
    write_moa(state, {**config, **change}, tmp_path / "x.safetensors")
    unet = load_part(world, "unet")
    with pytest.raises(ValueError, match="its tensors have other sizes"):
        load_moa(unet, tmp_path / "x.safetensors")
    add_moa(unet)  # it was left as it was


def test_pictures_that_unpack_to_gigabytes(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    Image.new("1", (120, 120)).save(tmp_path / "x.png")
    with pytest.raises(Image.DecompressionBombWarning), open_picture(tmp_path / "x.png", ("PNG",)):
        pass


def test_metadata_behind_a_chunk_that_claims_gigabytes(tmp_path):
    path = tmp_path / "x.png"
    Image.new("RGB", (16, 16)).save(path)
    data, (soft, hard) = path.read_bytes(), resource.getrlimit(resource.RLIMIT_AS)
    begin = data.index(b"IDAT") - 4
    path.write_bytes(data[:begin] + b"\xff\xff\xff\xf0" + data[begin + 4:])
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2 ** 30, hard))
    try:
        assert read_settings(path) is None
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_metadata_nested_without_end(tmp_path):
    from PIL.PngImagePlugin import PngInfo
    info = PngInfo()
    info.add_text("moa", "[" * 50_000)
    Image.new("L", (16, 16)).save(tmp_path / "x.png", pnginfo=info)
    assert read_settings(tmp_path / "x.png") is None


def test_more_people_than_any_picture_shows(tmp_path):
    from data.fastcomposer import MOST_SEGMENTS, read_record
    from tests.test_data import write_sample
    path = write_sample(tmp_path).with_suffix(".json")
    record = json.loads(path.read_text())
    record["segments"] = [{**record["segments"][0], "id": k} for k in range(MOST_SEGMENTS + 1)]
    path.write_text(json.dumps(record))
    with pytest.raises(DataError, match="101 people are more than 100"):
        read_record(tmp_path, path.stem)


# Writing -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("unexpected pos 64")])
def test_what_cannot_be_written_is_named(error, tmp_path):
    def fail(temporary: Path) -> None:
        temporary.write_bytes(b"half")
        raise error
    (tmp_path / "x.pt").write_bytes(b"before")
    with pytest.raises(OSError, match=r"x.pt cannot be written \(.*\): what was there before") as found:
        write_whole(tmp_path / "x.pt", fail)
    assert len(str(found.value).splitlines()) == 1
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"x.pt": b"before"}
