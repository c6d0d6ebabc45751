"""Models on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from afa.errors import UserError, one_line
from afa.run import CONFIG, MODEL

PREFIX = "hf://"
FILES = [MODEL, CONFIG]
"""Files that a download fetches."""


def download(name: str) -> Path:
    """Download the model 'hf://owner/name' or 'hf://owner/name@revision' and return its folder in the Hub's cache.

    UserError if it can't be downloaded and is not in the cache.
    """
    repository, _, revision = name.removeprefix(PREFIX).partition("@")
    if repository.count("/") != 1 or not all(repository.split("/")):
        raise UserError(f"'{name}' is not the name of a model; write {PREFIX}OWNER/NAME")
    from huggingface_hub import snapshot_download  # a dependency of timm

    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=FILES))
    except Exception as error:  # its own errors, and those of the HTTP library
        raise UserError(f"{name} can't be downloaded ({one_line(error)}); check the name and the network") from error


def short_name(name: str) -> str:
    """NAME of 'hf://owner/NAME@revision'."""
    return name.partition("@")[0].rpartition("/")[2]
