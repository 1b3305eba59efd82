"""Models of the Hugging Face Hub: `--model-path ORG/NAME` becomes a folder or file of this machine.

A model is found once, in the process that the user starts, before other processes start: they get the local path. Only
the files that Kvist reads are downloaded. They stay in the Hub's own cache (`HF_HOME`), shared with other programs.
`name.py` says which texts name a model of the Hub, `files.py` chooses the files (pure), `download.py` gets them.
"""

from __future__ import annotations

from kvist.errors import ConfigError, ModelLoadError
from kvist.hub.name import hub_name, is_local
from kvist.hub.showing import Show

__all__ = ["find_model"]


def find_model(model_path: str | None, revision: str | None, *, weights: bool = True, show: Show) -> str | None:
    """Return the local path of a model: `model_path` itself if it exists or does not name a model of the Hub, else the
    path of its files, which are downloaded if necessary. `show` gets the progress of the download.

    Without `weights` only configuration and tokenizer are downloaded. Raises `ConfigError` for a revision of a local
    path, `ModelLoadError` if the model cannot be downloaded."""
    name = None if model_path is None or is_local(model_path) else hub_name(model_path)
    if name is None:
        if revision is not None:
            raise ConfigError(
                f"--revision {revision} is a branch, tag or commit of the Hugging Face Hub, and "
                f"{'the embedded model' if model_path is None else model_path} is not there: omit it",
                param="revision",
            )
        return model_path
    try:
        from kvist.hub.download import download  # the client is slow to import, and optional
    except ImportError as error:
        raise ModelLoadError(
            f"--model-path {model_path}: no such folder or .gguf file. To get the model from the Hugging Face Hub: "
            "pip install 'kvist[hub]'",
            param="model_path",
        ) from error
    return str(download(name, revision, weights=weights, show=show))
