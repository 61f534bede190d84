from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub as hf
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save

import retex_cli
from retex_cli.errors import RetexError
from retex_cli.io.checkpoint import open_checkpoint, open_expert

REPO, COMMIT, OTHER = "org/tiny-model", "a" * 40, "b" * 40
WEIGHTS = {"w": torch.arange(6.0).view(2, 3), "ids": torch.arange(3)}


def repository(weights: dict[str, torch.Tensor] = WEIGHTS) -> dict[str, bytes]:
    return {
        "config.json": b'{"model_type": "bert", "vocab_size": 5}',
        "model.safetensors": save(weights),
        "tokenizer.json": b"{}",
        "1_Pooling/config.json": b"[]",
        "README.md": b"# card",
        "optimizer.pt": b"no",
    }


def sharded_repository() -> dict[str, bytes]:
    files = {f"model-0000{k}-of-00002.safetensors": save({f"w{k}": torch.full((4,), float(k))}) for k in (1, 2)}
    mapping = {f"w{k}": f"model-0000{k}-of-00002.safetensors" for k in (1, 2)}
    index = json.dumps({"metadata": {}, "weight_map": mapping}).encode()
    return {"config.json": b"{}", "model.safetensors.index.json": index, **files}


def lay_cache(cache: Path, files: dict[str, bytes], commit: str = COMMIT, ref: str | None = "main") -> Path:
    """What huggingface_hub leaves behind: blobs by their hash, snapshots of links, a ref."""
    root = cache / f"models--{REPO.replace('/', '--')}"
    for name, content in files.items():
        blob = root / "blobs" / hashlib.sha256(content).hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        link = root / "snapshots" / commit / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    if ref:
        (root / "refs").mkdir(exist_ok=True)
        (root / "refs" / ref).write_text(commit)
    return root / "snapshots" / commit


class Hub:
    """A small Hub on 127.0.0.1; it notes what was asked for."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = repository()
        self.asked: list[tuple[str, str]] = []
        self.ranges = True
        self.lists = True
        self.status = 200
        self.error: str | None = None
        self.token: str | None = None
        self.commits = {"main": COMMIT, COMMIT: COMMIT, "v2": OTHER, OTHER: OTHER}
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, self))
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def downloads(self, name: str) -> int:
        """How often the whole of a file was asked for."""
        return sum(method == "GET" and path.endswith(f"/{name}") for method, path in self.asked)


class Handler(BaseHTTPRequestHandler):
    def __init__(self, hub: Hub, *args: object) -> None:
        self.hub = hub
        super().__init__(*args)  # type: ignore[arg-type]

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer("HEAD")

    def do_GET(self) -> None:
        self.answer("GET")

    def send(self, status: int, body: bytes, headers: dict[str, str], method: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if method == "GET":
            self.wfile.write(body)

    def answer(self, method: str) -> None:
        wanted, path = self.headers.get("Range"), self.path.strip("/")
        self.hub.asked.append(("RANGE" if wanted else method, self.path))
        authorised = self.hub.token is None or self.headers.get("Authorization") == f"Bearer {self.hub.token}"
        if self.hub.error or not authorised:
            code = self.hub.error or "RepoNotFound"
            self.send(self.hub.status if self.hub.error else 401, b"", {"X-Error-Code": code}, method)
        elif self.hub.lists and path.startswith(f"api/models/{REPO}/revision/"):
            commit = self.hub.commits[path.rpartition("/")[2]]
            siblings = [{"rfilename": name} for name in self.hub.files]
            self.send(200, json.dumps({"id": REPO, "sha": commit, "siblings": siblings}).encode(), {}, method)
        elif path.startswith(f"{REPO}/resolve/"):
            revision, _, name = path.removeprefix(f"{REPO}/resolve/").partition("/")
            self.resolve(method, revision, name, wanted)
        else:
            self.send(404, b"", {"X-Error-Code": "RepoNotFound"}, method)

    def resolve(self, method: str, revision: str, name: str, wanted: str | None) -> None:
        commit, content = self.hub.commits.get(revision), self.hub.files.get(name)
        if commit is None:
            self.send(404, b"", {"X-Error-Code": "RevisionNotFound"}, method)
            return
        headers = {"X-Repo-Commit": commit}
        if content is None:
            self.send(404, b"", {"X-Error-Code": "EntryNotFound", **headers}, method)
            return
        headers["ETag"] = f'"{hashlib.sha256(content).hexdigest()}"'
        if wanted and self.hub.ranges:
            first, last = (int(number) for number in wanted.removeprefix("bytes=").split("-"))
            part = content[first : last + 1]
            headers["Content-Range"] = f"bytes {first}-{first + len(part) - 1}/{len(content)}"
            self.send(206, part, headers, method)
        else:
            self.send(200, content, headers, method)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hub cache, offline; the current directory is empty too."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # huggingface_hub waits between its attempts
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


@pytest.fixture
def hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub that answers, and an empty cache."""
    served = Hub()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", served.url)
    template = served.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    yield served
    served.server.shutdown()
    served.server.server_close()
    hf.close_session()


@pytest.mark.parametrize("reference", [REPO, f"{REPO}@main", f"{REPO}@{COMMIT}"])
def test_offline_the_cache_answers_by_name_branch_or_commit(cache: Path, reference: str) -> None:
    folder = lay_cache(cache, repository())
    with open_checkpoint(reference) as checkpoint:
        assert checkpoint.reference == reference
        assert checkpoint.revision == COMMIT
        assert checkpoint.folder == folder
        assert checkpoint.files == (folder / "model.safetensors",)
        assert checkpoint.config == {"model_type": "bert", "vocab_size": 5}
        assert torch.equal(checkpoint.read("w"), WEIGHTS["w"])
        assert sorted(checkpoint.side_files()) == ["1_Pooling/config.json", "config.json", "tokenizer.json"]


def test_offline_each_revision_is_its_own(cache: Path) -> None:
    lay_cache(cache, repository())
    lay_cache(cache, repository({"new": torch.ones(1)}), OTHER, "v2")
    with open_checkpoint(f"{REPO}@v2") as checkpoint:
        assert (checkpoint.revision, list(checkpoint.tensors)) == (OTHER, ["new"])
    with open_checkpoint(REPO) as checkpoint:
        assert (checkpoint.revision, set(checkpoint.tensors)) == (COMMIT, set(WEIGHTS))


def test_offline_shards_open_and_a_missing_one_is_named(cache: Path) -> None:
    folder = lay_cache(cache, sharded_repository())
    with open_checkpoint(REPO) as checkpoint:
        assert checkpoint.read("w2").tolist() == [2.0] * 4
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(RetexError, match=r"model-00002-of-00002\.safetensors: not in the Hub cache") as caught:
        open_checkpoint(REPO)
    assert "\n" not in caught.value.message


def test_offline_what_is_not_in_the_cache_is_said(cache: Path) -> None:
    with pytest.raises(RetexError, match="org/none: no such file or folder, and not in the Hub cache") as caught:
        open_checkpoint("org/none")
    assert caught.value.hint is not None
    assert "HF_HUB_OFFLINE" in caught.value.hint
    lay_cache(cache, repository())
    with pytest.raises(RetexError, match=f"the cache has commit {COMMIT}"):
        open_checkpoint(f"{REPO}@v9")


def test_a_local_folder_wins_over_an_id(cache: Path, make_model: Callable[..., Path]) -> None:
    lay_cache(cache, repository())
    make_model(REPO, {"local": torch.ones(1)})
    with open_checkpoint(REPO) as checkpoint:
        assert list(checkpoint.tensors) == ["local"]
        assert checkpoint.revision is None


def test_headers_come_first_and_weights_when_they_are_read(hub: Hub, cache: Path) -> None:
    with open_checkpoint(REPO) as checkpoint:
        assert checkpoint.revision == COMMIT
        assert checkpoint.config == {"model_type": "bert", "vocab_size": 5}
        assert checkpoint.tensors["w"].shape == (2, 3)
        assert hub.downloads("model.safetensors") == 0
        assert not checkpoint.files[0].exists()
        out = torch.empty(2, dtype=torch.bfloat16)
        checkpoint.read_into("w", 3, out)
        assert out.tolist() == [3.0, 4.0]
        assert torch.equal(checkpoint.read("ids"), WEIGHTS["ids"])
        assert hub.downloads("model.safetensors") == 1
        assert checkpoint.files[0].exists()
        assert checkpoint.files[0].is_relative_to(cache)
        assert hub.downloads("optimizer.pt") == 0


def test_after_one_download_the_same_id_works_offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_checkpoint(REPO) as checkpoint:
        checkpoint.fetch()
        sides = checkpoint.side_files()
    assert sides["1_Pooling/config.json"].read_bytes() == b"[]"
    asked = len(hub.asked)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with open_checkpoint(REPO) as checkpoint:
        assert checkpoint.revision == COMMIT
        assert torch.equal(checkpoint.read("w"), WEIGHTS["w"])
        assert checkpoint.side_files() == sides
    assert len(hub.asked) == asked


def test_what_is_in_the_cache_is_not_downloaded_again(hub: Hub) -> None:
    for _ in range(2):
        with open_checkpoint(REPO) as checkpoint:
            checkpoint.read("w")
    assert hub.downloads("model.safetensors") == 1


class Count:
    def __init__(self) -> None:
        self.total = self.done = 0

    def start(self, label: str, total: int) -> None:
        self.total += total

    def advance(self, steps: int = 1) -> None:
        self.done += steps

    def note(self, text: str) -> None:
        pass


def test_fetch_counts_bytes_and_draws_nothing(hub: Hub, capfd: pytest.CaptureFixture[str]) -> None:
    count = Count()
    with open_checkpoint(REPO) as checkpoint:
        checkpoint.fetch(count)
        checkpoint.fetch(count)
    assert count.total == count.done == len(hub.files["model.safetensors"])
    assert capfd.readouterr() == ("", "")


def test_a_revision_is_resolved_to_its_commit(hub: Hub) -> None:
    with open_checkpoint(f"{REPO}@v2") as checkpoint:
        assert checkpoint.revision == OTHER
        assert OTHER in str(checkpoint.folder)


@pytest.mark.parametrize(("ranges", "lists"), [(False, True), (True, False), (False, False)])
def test_a_simpler_endpoint_will_do(hub: Hub, ranges: bool, lists: bool) -> None:
    hub.ranges, hub.lists = ranges, lists
    with open_checkpoint(REPO) as checkpoint:
        assert set(checkpoint.tensors) == set(WEIGHTS)
        assert torch.equal(checkpoint.read("w"), WEIGHTS["w"])
        assert sorted(checkpoint.side_files()) == ["1_Pooling/config.json", "config.json", "tokenizer.json"]


def test_a_header_longer_than_the_first_request(hub: Hub) -> None:
    many = {f"layer.{k}.a.rather.long.name.weight": torch.full((1,), float(k)) for k in range(2000)}
    hub.files = repository(many)
    with open_checkpoint(REPO) as checkpoint:
        assert len(checkpoint.tensors) == 2000
        assert checkpoint.read("layer.1999.a.rather.long.name.weight").item() == 1999.0


def test_shards_are_judged_by_index_and_headers_and_fetched_one_by_one(hub: Hub) -> None:
    hub.files = sharded_repository()
    with open_checkpoint(REPO) as checkpoint:
        assert list(checkpoint.tensors) == ["w1", "w2"]
        checkpoint.read("w2")
    assert hub.downloads("model-00001-of-00002.safetensors") == 0
    assert hub.downloads("model-00002-of-00002.safetensors") == 1


def test_a_damaged_remote_header_is_refused_before_the_download(hub: Hub) -> None:
    hub.files["model.safetensors"] = hub.files["model.safetensors"][:-4]
    with pytest.raises(RetexError, match=r"model\.safetensors: truncated safetensors file: tensor 'w' is cut off"):
        open_checkpoint(REPO)
    assert hub.downloads("model.safetensors") == 0


def test_a_pickle_is_downloaded_to_be_opened(hub: Hub, tmp_path: Path) -> None:
    torch.save(WEIGHTS, tmp_path / "x.bin")
    hub.files = {"config.json": b"{}", "pytorch_model.bin": (tmp_path / "x.bin").read_bytes()}
    with open_checkpoint(REPO) as checkpoint:
        assert torch.equal(checkpoint.read("w"), WEIGHTS["w"])


def test_a_repository_without_a_config_opens(hub: Hub) -> None:
    hub.files = {"model.safetensors": save(WEIGHTS)}
    with open_checkpoint(REPO) as checkpoint:
        assert checkpoint.config is None
        assert checkpoint.revision == COMMIT
        assert torch.equal(checkpoint.read("w"), WEIGHTS["w"])


def test_a_repository_without_weights_is_refused(hub: Hub) -> None:
    hub.files = {"config.json": b"{}"}
    with pytest.raises(RetexError, match=f"{REPO}: no weights"):
        open_checkpoint(REPO)


def test_an_adapter_on_the_hub_becomes_an_expert(hub: Hub, make_model: Callable[..., Path]) -> None:
    a, b = torch.ones(1, 3), torch.tensor([[1.0], [2.0]])
    adapter = {"base_model.model.w.lora_A.weight": a, "base_model.model.w.lora_B.weight": b}
    settings = {"peft_type": "LORA", "lora_alpha": 2}
    hub.files = {
        "adapter_config.json": json.dumps(settings).encode(),
        "adapter_model.safetensors": save(adapter),
        "tokenizer.json": b"{}",
    }
    with pytest.raises(RetexError, match="a LoRA adapter"):
        open_checkpoint(REPO)
    with (
        open_checkpoint(make_model("base", {"w.weight": torch.zeros(2, 3)})) as base,
        open_expert(REPO, base) as expert,
    ):
        assert expert.revision == COMMIT
        assert expert.read("w.weight").tolist() == [[2.0] * 3, [4.0] * 3]
        assert "tokenizer.json" in expert.side_files()


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (404, "RepoNotFound", "no such file or folder, and the Hub at .* has no such model"),
        (403, "GatedRepo", "only to those who accepted its conditions"),
        (404, "RevisionNotFound", "has the model but not this revision"),
        (503, "Internal", "the Hub at .* answered 503"),
    ],
)
def test_the_hub_s_refusals_in_words(hub: Hub, status: int, code: str, message: str) -> None:
    hub.status, hub.error = status, code
    with pytest.raises(RetexError, match=message) as caught:
        open_checkpoint(REPO)
    assert caught.value.message.startswith(f"{REPO}: ")
    assert caught.value.hint
    assert "\n" not in caught.value.message


def test_a_private_model_needs_the_token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token = "hf_secret"
    with pytest.raises(RetexError, match="no such model") as caught:
        open_checkpoint(REPO)
    assert caught.value.hint is not None
    assert "HF_TOKEN" in caught.value.hint
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with open_checkpoint(REPO) as checkpoint:
        assert torch.equal(checkpoint.read("w"), WEIGHTS["w"])


def test_an_unreachable_hub_falls_back_to_the_cache_or_says_so(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    template = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    with pytest.raises(
        RetexError, match=f"{REPO}: not on this machine, and the Hub at http://127.0.0.1:9 does not"
    ) as caught:
        open_checkpoint(REPO)
    assert "\n" not in caught.value.message
    lay_cache(cache, repository())
    with open_checkpoint(REPO) as checkpoint:
        assert checkpoint.revision == COMMIT
        assert torch.equal(checkpoint.read("w"), WEIGHTS["w"])


def test_the_environment_alone_decides(tmp_path: Path) -> None:
    """HF_ENDPOINT, then HF_HUB_OFFLINE with the same HF_HOME, each in a process of its own."""
    served = Hub()
    script = (
        "from retex_cli.io.checkpoint import open_checkpoint as o\n"
        f"c = o('{REPO}'); print(c.revision, c.read('w').sum().item(), sorted(c.side_files()))"
    )
    source = str(Path(retex_cli.__file__).parents[1])
    common = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | {
        "HF_HOME": str(tmp_path / "home"),
        "PYTHONPATH": source,
    }
    answers = []
    for setting in ({"HF_ENDPOINT": served.url}, {"HF_HUB_OFFLINE": "1"}):
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", script],
            env=common | setting,
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        answers.append(done.stdout)
        served.server.shutdown()
    served.server.server_close()
    expected = f"{COMMIT} 15.0 ['1_Pooling/config.json', 'config.json', 'tokenizer.json']\n"
    assert answers == [expected, expected]
