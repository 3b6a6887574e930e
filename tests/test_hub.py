"""Weights by name, and sharing them, against a stand-in of the hub that speaks its protocol."""
import base64
import hashlib
import json
import shutil
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import huggingface_hub.constants
import pytest

import sample
from weights import publish
from weights.hub import CARD, find_moa, find_weights

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """Repositories -> file name -> bytes. One of them is private."""

    protocol_version = "HTTP/1.1"  # connections stay open, as the real one's
    repositories: dict[str, dict[str, bytes]] = {}

    def log_message(self, *arguments) -> None:
        pass

    def do_GET(self) -> None:
        path = self.path.split("?")[0].removeprefix("/api/models")
        name = "/".join(path.split("/")[1:3])
        files = self.repositories.get(name)
        if files is None or name == "me/private":
            self.answer(404 if files is None else 401, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif "/resolve/" in path:
            data = files[path.split("/", 5)[5]]
            self.answer(200, data, {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'})
        elif "/tree/" in path:
            self.answer(200, [{"type": "file", "path": file, "size": len(data), "oid": "0" * 40}
                              for file, data in files.items()])
        elif path.endswith("/revision/nowhere"):
            self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        else:
            self.answer(200, {"id": name, "sha": COMMIT, "siblings": [{"rfilename": f} for f in files]})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path.endswith("/repos/create"):
            self.repositories.setdefault("me/new", {})
            self.answer(200, {"url": "https://huggingface.co/me/new"})
        elif "/preupload/" in self.path:
            self.answer(200, {"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                                        for file in json.loads(body)["files"]]})
        elif "/commit/" in self.path:
            for entry in map(json.loads, body.splitlines()):
                if entry["key"] == "file":
                    data = base64.b64decode(entry["value"]["content"])
                    self.repositories["me/new"][entry["value"]["path"]] = data
            commit = f"https://huggingface.co/me/new/commit/{COMMIT}"
            self.answer(200, {"success": True, "commitUrl": commit, "commitOid": COMMIT})
        else:
            self.answer(200, {})

    def answer(self, status: int, data: object, headers: dict[str, str] | None = None) -> None:
        data = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@pytest.fixture
def hub(world, tmp_path, monkeypatch):
    """Has the tiny world as me/tiny, a repository of something else, and a private one."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    files = {file.name: file.read_bytes() for file in world.iterdir() if file.is_file()}
    card = b"---\nlicense: openrail\n---\n# tiny\n"
    Hub.repositories = {"me/tiny": {**files, CARD: card, "danger.bin": b"x"}, "me/other": {CARD: card},
                        "me/private": {}}
    address, constants = f"http://127.0.0.1:{server.server_port}", huggingface_hub.constants
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    yield server
    server.shutdown()
    server.server_close()


def test_weights_by_name_draw_what_the_folder_draws(hub, world, capsys):
    """And once more without the hub. Nothing but weights and card is fetched."""
    drawn = []
    for weights in (["--weights", world], ["--weights", f"me/tiny@{COMMIT}"],
                    ["--weights", world, "--moa", "me/tiny"]):
        sample.main(["--prompt", "a woman", "--seed", "5", "--output", "a.png", *map(str, weights)])
        drawn.append(Path("a.png").read_bytes())
        Path("a.png").unlink()
    said = capsys.readouterr().out
    assert f"me/tiny@{COMMIT}: licence openrail" in said and "me/tiny: licence openrail" in said
    assert len({picture.partition(b"IDAT")[2] for picture in drawn}) == 1
    hub.shutdown()
    hub.server_close()
    folder = find_weights(Path("me/tiny"))
    assert {file.suffix for file in folder.iterdir()} == {".safetensors", ".json", ".md"}


@pytest.mark.parametrize(("name", "find", "said"), [
    ("me/nothing", find_weights, "on the hub there is none or it is private"),
    ("me/private", find_weights, "on the hub there is none or it is private"),
    ("me/tiny@nowhere", find_weights, "cannot be had from the hub"),
    ("me/other", find_weights, "holds no weights of this project"),
    ("me/other", find_moa, "holds no moa.safetensors")])
def test_names_that_cannot_be_used(hub, name, find, said):
    with pytest.raises(ValueError, match=said):
        find(Path(name))


def test_without_a_network(hub):
    hub.shutdown()
    hub.server_close()
    with pytest.raises(ValueError, match="the hub cannot be reached"):
        find_weights(Path("me/tiny"))


def test_paths_are_paths(hub, world):
    """Also one that is not there, in a folder that is."""
    Path("runs").mkdir()
    for path in (world, Path("runs/none"), Path("nowhere"), Path("/a/b")):
        assert find_weights(path) == path == find_moa(path)


def test_what_is_shared_can_be_drawn_with(hub, world, tmp_path):
    shutil.copytree(world, "mine")
    (tmp_path / "mine" / "checkpoint.pt").write_bytes(b"secret")
    Path("results.json").write_text(json.dumps({"settings": {"count": 9}, "identity": {"mean": 0.5}}))
    options = ["mine", "me/new", "--license", "mit", "--results", "results.json"]
    publish.main([*options, "--dry-run", "dry"])
    publish.main(options)
    sent, written = Hub.repositories["me/new"], {f.name: f.read_bytes() for f in Path("dry").iterdir()}
    assert sent == written and "checkpoint.pt" not in sent
    card = sent[CARD].decode()
    assert "license: mit" in card and "| identity | 0.500 |" in card and "9 cases" in card
    assert find_weights(Path("me/new")) != Path("me/new")


@pytest.mark.parametrize(("options", "said"), [
    ([], "me/new cannot be sent to the hub"), (["--dry-run", "."], "exists already: give a new folder"),
    (["--results", "tiny/config.json"], "config.json is no results.json")])
def test_what_cannot_be_shared_is_one_line(hub, world, options, said, capsys):
    shutil.copytree(world, "tiny")
    hub.shutdown()
    hub.server_close()
    for folder, expected in (("tiny", said), ("cache", "is no weights folder")):
        with pytest.raises(SystemExit, match="2"):
            publish.main([folder, "me/new", "--license", "mit", *options])
        error, = capsys.readouterr().err.splitlines()
        assert expected in error
