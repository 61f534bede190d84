"""One weight file on the Hub: its header by a ranged request, its data by a download when it is read."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Self

import huggingface_hub as hf
import torch
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status  # type: ignore[attr-defined]

from retex_cli.errors import RetexError
from retex_cli.io.safetensors_file import SafetensorsFile, header_length, parse_header, tied_by_metadata
from retex_cli.io.tensors import TensorInfo
from retex_cli.progress import Progress

#: Fetched at first: holds the whole header of most models.
_FIRST_BYTES = 1 << 17


def is_outage(error: BaseException) -> bool:
    """Whether the Hub could not be reached or is broken, as opposed to what it says about a model."""
    if isinstance(error, HfHubHTTPError):
        return bool(error.response.status_code >= 500)
    return isinstance(error, (OfflineModeIsEnabled, ConnectionError)) or type(error).__module__.startswith("httpx")


@contextlib.contextmanager
def hub_words(reference: str) -> Iterator[None]:
    """Turns what huggingface_hub raises into a RetexError that names the reference and the next step."""
    try:
        yield
    except GatedRepoError:
        raise RetexError(
            f"{reference}: the Hub gives this model only to those who accepted its conditions",
            "accept them on the model's page and set HF_TOKEN",
        ) from None
    except RepositoryNotFoundError:
        raise RetexError(
            f"{reference}: no such file or folder, and the Hub at {constants.ENDPOINT} has no such model",
            "check the name; a private model needs HF_TOKEN",
        ) from None
    except RevisionNotFoundError:
        raise RetexError(
            f"{reference}: the Hub has the model but not this revision", "check what follows the @"
        ) from None
    except LocalEntryNotFoundError as error:
        raise _unreachable(reference, error) from None
    except HfHubHTTPError as error:
        raise RetexError(
            f"{reference}: the Hub at {constants.ENDPOINT} answered {error.response.status_code}", "try again later"
        ) from None
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise RetexError(
                f"{reference}: the disk of the Hub cache {constants.HF_HUB_CACHE} is full",
                "free some space, or point HF_HOME to another disk",
            ) from None
        if not is_outage(error):
            raise
        raise _unreachable(reference, error) from None
    except Exception as error:
        if not is_outage(error):
            raise
        raise _unreachable(reference, error) from None


def _first_cause(error: BaseException) -> str:
    cause = error.__cause__ or error
    return (str(cause).strip().splitlines() or [type(cause).__name__])[0]


def _unreachable(reference: str, error: BaseException) -> RetexError:
    if constants.HF_HUB_OFFLINE:
        return RetexError(
            f"{reference}: not in the Hub cache {constants.HF_HUB_CACHE}", "HF_HUB_OFFLINE is set: unset it to download"
        )
    reason = _first_cause(error)
    return RetexError(
        f"{reference}: not on this machine, and the Hub at {constants.ENDPOINT} does not answer ({reason})",
        "check the name and the connection; HF_HUB_OFFLINE=1 asks the cache alone",
    )


class _Bar:
    """What huggingface_hub takes for a progress bar; it draws nothing and tells a Progress, if there is one."""

    progress: Progress | None = None

    def __init__(self, *args: object, **kwargs: object) -> None:
        del args, kwargs

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, n: float | None = 1) -> None:
        if self.progress is not None and n:
            self.progress.advance(int(n))


def bring(reference: str, repo: str, name: str, commit: str, progress: Progress | None = None) -> Path:
    """Download a file into the Hub cache, unless it is there; ``progress`` is advanced by bytes."""
    bar = type("Bar", (_Bar,), {"progress": progress})
    with hub_words(f"{reference}: {name}"):
        return Path(hf.hf_hub_download(repo, name, revision=commit, tqdm_class=bar))


class RemoteFile:
    """A safetensors file of the Hub that is not in the cache yet: header now, data when it is read."""

    def __init__(self, reference: str, repo: str, name: str, commit: str, folder: Path) -> None:
        self.path = folder / name
        self._where = (reference, repo, name, commit)
        self._lock = threading.Lock()
        self._local: SafetensorsFile | None = None
        with hub_words(f"{reference}: {name}"):
            self.size, header, data_bytes = self._remote_header()
        tensors, _, metadata = parse_header(self.path, header, data_bytes)
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(tensors)
        self.metadata: Mapping[str, str] = MappingProxyType(metadata)
        self.aliases: Mapping[str, str] = MappingProxyType(tied_by_metadata(tensors, metadata))

    @property
    def is_local(self) -> bool:
        """Whether the data has been downloaded."""
        return self._local is not None

    def fetch(self, progress: Progress | None = None) -> None:
        """Download the file; RetexError if what arrives is not what the header promised."""
        self._file(progress)

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor in memory of its own."""
        return self._file().read(name)

    def read_into(self, name: str, start: int, out: torch.Tensor) -> None:
        """Elements ``[start, start + out.numel())`` of the flattened tensor, converted to ``out.dtype``."""
        self._file().read_into(name, start, out)

    def unchanged(self) -> os.stat_result | None:
        """See ``SafetensorsFile``; None before the data is there."""
        return self._local.unchanged() if self._local else None

    def close(self) -> None:
        """Give back the downloaded file."""
        if self._local is not None:
            self._local.close()

    def _file(self, progress: Progress | None = None) -> SafetensorsFile:
        with self._lock:
            if self._local is None:
                local = SafetensorsFile(bring(*self._where, progress))
                if {i.name: (i.dtype, i.shape) for i in local.tensors.values()} != {
                    i.name: (i.dtype, i.shape) for i in self.tensors.values()
                }:
                    local.close()
                    raise RetexError(f"{self.path}: the downloaded file is not the one whose header the Hub sent")
                self._local = local
            return self._local

    def _remote_header(self) -> tuple[int, bytes, int]:
        """Size of the file, JSON header, bytes of data behind it; two small requests at most."""
        size, first = self._range(0, _FIRST_BYTES)
        length = header_length(self.path, first[:8], size)
        if 8 + length > len(first):
            _, first = self._range(0, 8 + length)
        return size, first[8 : 8 + length], size - 8 - length

    def _range(self, start: int, stop: int) -> tuple[int, bytes]:
        """Size of the whole file and its bytes ``[start, stop)``; a server that ignores ranges is cut off."""
        _, repo, name, commit = self._where
        headers = {**build_hf_headers(), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        url = hf.hf_hub_url(repo, name, revision=commit)
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with get_session().stream("GET", url, headers=headers, follow_redirects=True, timeout=timeout) as response:
            hf_raise_for_status(response)
            whole = response.headers.get("Content-Range", "").rpartition("/")[2] or response.headers["Content-Length"]
            received = bytearray()
            for chunk in response.iter_bytes():
                received += chunk
                if len(received) >= stop - start:
                    break
        return int(whole), bytes(received[: stop - start])
