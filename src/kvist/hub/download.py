"""Downloads a model into the Hub's cache with the Hub's own client, and explains what went wrong.

    small files (configuration, tokenizer, index)  ──►  choose the weights, check the free space  ──►  weights

The first step resolves the revision to a commit; the second asks for that commit. Processes that want the same file
take turns (the client locks each file). If the Hub cannot be reached, or HF_HUB_OFFLINE is set, the cache is used if it
has all files. The client bounds its waits: HF_HUB_ETAG_TIMEOUT for an answer, HF_HUB_DOWNLOAD_TIMEOUT for a piece of a
file.
"""

from __future__ import annotations

import errno
import shutil
from glob import escape
from pathlib import Path

from huggingface_hub import constants, errors, get_cached_repo_tree, get_token, snapshot_download
from huggingface_hub.utils.tqdm import disable_progress_bars

from kvist.checkpoint import INDEX_FILE, safetensors_files
from kvist.errors import ModelLoadError
from kvist.hub.files import SMALL_FILES, Chosen, choose_files, missing_bytes
from kvist.hub.name import HubName
from kvist.hub.showing import Show, show_growth


def download(name: HubName, revision: str | None, *, weights: bool, show: Show) -> Path:
    """Return the folder or GGUF file of the model, downloaded if necessary. Raises `ModelLoadError`."""
    disable_progress_bars()  # `show` has its place
    try:
        return _download(name, revision, weights=weights, show=show)
    except ModelLoadError:
        raise
    except Exception as error:  # the client raises its own errors, those of its HTTP library, and OSError
        raise ModelLoadError(explanation(name, revision, error), param="model_path") from error


def _download(name: HubName, revision: str | None, *, weights: bool, show: Show) -> Path:
    show(f"looking up {name}")
    folder = _snapshot(name, revision, frozenset(SMALL_FILES))
    sizes = _sizes(name, folder)
    if sizes is None:
        return folder / (name.file or "")  # of an older client's cache; complete or not, the loader will find out
    indexed = [path.name for path in safetensors_files(folder)] if INDEX_FILE in sizes else []
    chosen = choose_files(name, sizes, indexed, weights=weights)
    present = [path for path in chosen.files if (folder / path).is_file()]
    if (left := missing_bytes(sizes, chosen, present)) > 0:
        blobs = folder.parent.parent / "blobs"
        _check_space(name, left, blobs)
        with show_growth(blobs, left, f"downloading {name} ({_gigabytes(left)})", show):
            _snapshot(name, folder.name, chosen.files)
    return _checked(name, folder, chosen)


def _snapshot(name: HubName, revision: str | None, files: frozenset[str]) -> Path:
    """Return the folder of a commit that has those of the files that the repository has."""
    patterns = [escape(path) for path in sorted(files)]
    return Path(snapshot_download(name.repo, revision=revision, allow_patterns=patterns))


def _sizes(name: HubName, folder: Path) -> dict[str, int] | None:
    """Return the size of each file of the commit, as the Hub said; None if the cache does not know."""
    try:
        return {file.path: file.size for file in get_cached_repo_tree(name.repo, revision=folder.name)}
    except errors.CachedRepoTreeNotFoundError:
        return None


def _checked(name: HubName, folder: Path, chosen: Chosen) -> Path:
    """Return the model's path. Raises `ModelLoadError` if a file is still missing, as in an incomplete cache."""
    for path in sorted(chosen.files):
        if not (folder / path).is_file():
            raise ModelLoadError(f"{name}: {path} was not downloaded: try again", param="model_path")
    return folder if chosen.gguf is None else folder / chosen.gguf


def _check_space(name: HubName, num_bytes: int, folder: Path) -> None:
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise ModelLoadError(
            f"{name} needs {_gigabytes(num_bytes)} more, and {constants.HF_HUB_CACHE} has {_gigabytes(free)} free: "
            "make room, or set HF_HOME to a folder on a larger disk",
            param="model_path",
        )


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"


def explanation(name: HubName, revision: str | None, error: Exception) -> str:
    """Return what happened and what to do about it. Has no secret: the client's errors do not contain the token."""
    hub, has_token = constants.ENDPOINT, get_token() is not None
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # why the client looked into its cache
    if isinstance(error, errors.GatedRepoError):
        done = "this token's account has not" if has_token else "set HF_TOKEN to a token of an account that has"
        return f"{name} is gated: {done} accepted its conditions at {hub}/{name.repo}" + (
            ". Accept them, or set HF_TOKEN to a token of an account that has" if has_token else ""
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        token = "the account of HF_TOKEN may not see it" if has_token else "it is private: set HF_TOKEN"
        return f"--model-path {name}: neither a path of this machine nor a model at {hub}, unless {token}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"--revision {revision}: {name.repo} has no such branch, tag or commit; see {hub}/{name.repo}/tree/main"
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        if status == 401:
            return f"{hub} does not accept the token of HF_TOKEN: set a valid one, or unset it"
        return f"{name}: {hub} answered {status}: try again later, or give a folder of this machine"
    if constants.HF_HUB_OFFLINE:
        return (
            f"{name} is not complete in {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set: unset it, or download the "
            "model once with a network and the same HF_HOME"
        )
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOSPC):
        return f"cannot write {name} to {constants.HF_HUB_CACHE}: {error.strerror}; set HF_HOME to another folder"
    what = " ".join([type(error).__name__, *str(error).splitlines()[:1]])
    return (
        f"cannot download {name} from {hub} ({what}): "
        "check the network and HTTPS_PROXY, set HF_ENDPOINT to a mirror, or give a folder of this machine"
    )
