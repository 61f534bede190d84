"""Hub ids ``org/name[@revision]``: resolved to a commit, judged by configs and headers, downloaded when read.

huggingface_hub does the talking, so HF_HOME, HF_HUB_OFFLINE, HF_ENDPOINT and HF_TOKEN mean what they mean there, and
what is in its cache is not downloaded again.
"""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import huggingface_hub as hf
from huggingface_hub import constants
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

from retex_cli.errors import RetexError
from retex_cli.io.checkpoint import Checkpoint, check_index, open_file
from retex_cli.io.folders import Weights, find_weights, is_side_file, read_index, read_json, refuse_adapter
from retex_cli.io.hub_file import RemoteFile, bring, hub_words, is_outage
from retex_cli.io.tensors import TensorFile
from retex_cli.progress import Progress

_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w][\w./+-]*))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_PARALLEL = 8

#: Asked for one by one where the endpoint cannot list a repository.
_PROBED = (
    "config.json model.safetensors model.safetensors.index.json pytorch_model.bin pytorch_model.bin.index.json "
    "adapter_config.json adapter_model.safetensors adapter_model.bin generation_config.json tokenizer.json "
    "tokenizer_config.json special_tokens_map.json added_tokens.json vocab.txt vocab.json merges.txt tokenizer.model "
    "spiece.model sentencepiece.bpe.model preprocessor_config.json processor_config.json chat_template.json "
    "chat_template.jinja modules.json sentence_bert_config.json config_sentence_transformers.json 1_Pooling/config.json"
).split()


def parse_id(reference: str) -> tuple[str, str]:
    """Repository and revision (``main`` by default) of a reference that is no path. RetexError if it is no id."""
    match = _ID.fullmatch(reference)
    if match is None or reference.endswith((".safetensors", ".bin", ".pt", ".pth")):
        raise RetexError(f"{reference}: no such file or folder", "a Hub id has the form org/name or org/name@revision")
    return match["repo"], match["revision"] or "main"


@dataclass(frozen=True)
class Snapshot:
    """One commit of a Hub repository: its file names, and the folder of the cache where they are or will be."""

    reference: str
    repo: str
    commit: str
    folder: Path
    names: frozenset[str]

    def bring(self, name: str) -> Path:
        """The local path of a file, downloaded if it is not in the cache. RetexError when that fails."""
        path = self.folder / name
        return path if path.is_file() else bring(self.reference, self.repo, name, self.commit)

    @property
    def weights(self) -> Weights:
        """Which of the files hold the weights."""
        return find_weights(self.reference, {name for name in self.names if "/" not in name})

    def side_files(self) -> dict[str, Path]:
        """The files that travel with the weights, brought here."""
        names = sorted(name for name in self.names if is_side_file(name))
        with ThreadPoolExecutor(_PARALLEL) as pool:
            return dict(zip(names, pool.map(self.bring, names), strict=True))


def resolve(reference: str) -> Snapshot:
    """The commit that an id means now, and its files; from the cache alone when offline or out of reach."""
    repo, revision = parse_id(reference)
    if constants.HF_HUB_OFFLINE:
        return _cached(reference, repo, revision)
    with hub_words(reference):
        try:
            commit = _commit(reference, repo, revision)
            return Snapshot(reference, repo, commit, _repo_cache(repo) / "snapshots" / commit, _listing(repo, commit))
        except Exception as error:
            folder = _cached_folder(repo, revision)
            if folder is None or not is_outage(error):
                raise
            return Snapshot(reference, repo, folder.name, folder, _files_of(folder))


def _repo_cache(repo: str) -> Path:
    return Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"


def _files_of(folder: Path) -> frozenset[str]:
    return frozenset(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _cached_folder(repo: str, revision: str) -> Path | None:
    cache = _repo_cache(repo)
    ref = cache / "refs" / revision
    folder = cache / "snapshots" / (ref.read_text().strip() if ref.is_file() else revision)
    return folder if folder.is_dir() else None


def _cached(reference: str, repo: str, revision: str) -> Snapshot:
    folder = _cached_folder(repo, revision)
    if folder is None:
        known = sorted(path.name for path in (_repo_cache(repo) / "snapshots").glob("*"))
        has = f"; the cache has commit {known[-1]}" if known else ""
        raise RetexError(
            f"{reference}: no such file or folder, and not in the Hub cache {constants.HF_HUB_CACHE}{has}",
            "HF_HUB_OFFLINE is set: unset it to download, or name what is there",
        )
    return Snapshot(reference, repo, folder.name, folder, _files_of(folder))


def _commit(reference: str, repo: str, revision: str) -> str:
    """The commit of a revision, by one request that is not repeated: an outage should show at once.

    A config is then downloaded under the revision's own name: huggingface_hub notes in its cache which commit the name
    meant, and the model opens offline the next time.
    """
    commit: str | None = None
    for name in ("config.json", "adapter_config.json"):
        try:
            metadata = hf.get_hf_file_metadata(hf.hf_hub_url(repo, name, revision=revision))
        except EntryNotFoundError as error:
            response = getattr(error, "response", None)
            commit = commit or (response.headers.get("X-Repo-Commit") if response is not None else None)
        else:
            if metadata.commit_hash:
                bring(reference, repo, name, revision)
                return metadata.commit_hash
    commit = commit or hf.HfApi().model_info(repo, revision=revision).sha
    if commit is None:
        raise RetexError(f"{reference}: the Hub does not say which commit this is")
    return commit


def _listing(repo: str, commit: str) -> frozenset[str]:
    """The file names of a commit; an endpoint without the listing is asked for the usual names."""
    try:
        siblings = hf.HfApi().model_info(repo, revision=commit).siblings
    except HfHubHTTPError:
        siblings = None
    if siblings:
        return frozenset(file.rfilename for file in siblings)
    with ThreadPoolExecutor(_PARALLEL) as pool:
        there = list(pool.map(lambda name: _is_there(repo, name, commit), _PROBED))
    return frozenset(name for name, found in zip(_PROBED, there, strict=True) if found)


def _is_there(repo: str, name: str, commit: str) -> bool:
    try:
        hf.get_hf_file_metadata(hf.hf_hub_url(repo, name, revision=commit))
    except HfHubHTTPError:
        return False
    return True


class HubCheckpoint(Checkpoint):
    """A checkpoint on the Hub: opened by its headers, its weights downloaded by ``fetch`` or by the first read."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        refuse_adapter(snapshot.reference, snapshot.weights)
        config = read_json(snapshot.bring("config.json")) if "config.json" in snapshot.names else None
        super().__init__(
            snapshot.reference, _open_parts(snapshot), folder=snapshot.folder, revision=snapshot.commit, config=config
        )

    def side_files(self) -> dict[str, Path]:
        """The files that travel with the weights, downloaded if they are not here."""
        return self._snapshot.side_files()

    def fetch(self, progress: Progress | None = None) -> None:
        """Download the weights that are not in the cache; ``progress`` counts bytes."""
        missing = [part for part in self._parts if isinstance(part, RemoteFile) and not part.is_local]
        if progress is not None and missing:
            progress.start(f"download {self.reference}", sum(part.size for part in missing))
        for part in missing:
            part.fetch(progress)


def _open_parts(snapshot: Snapshot) -> list[TensorFile]:
    """The weight files: local ones as they are, others by the header that the Hub sends."""
    weights = snapshot.weights
    files, mapping = [weights.file], dict[str, str]()
    if weights.indexed:
        mapping = read_index(snapshot.bring(weights.file))
        files = sorted(set(mapping.values()))
    with ThreadPoolExecutor(_PARALLEL) as pool:
        parts = list(pool.map(lambda name: _open_part(snapshot, name), files))
    if weights.indexed:
        check_index(snapshot.folder / weights.file, mapping, parts)
    return parts


def _open_part(snapshot: Snapshot, name: str) -> TensorFile:
    if (snapshot.folder / name).is_file() or PurePosixPath(name).suffix != ".safetensors":
        return open_file(snapshot.bring(name))
    return RemoteFile(snapshot.reference, snapshot.repo, name, snapshot.commit, snapshot.folder)


def open_hub(reference: str) -> Checkpoint:
    """A model of the Hub by its id; adapters are refused here."""
    return HubCheckpoint(resolve(reference))
