"""A cache of the Hub as huggingface_hub lays it out, filled by hand: nothing is downloaded.

models--acme--tiny/refs/main              the commit that the branch stands at
models--acme--tiny/blobs/<sha256>         contents
models--acme--tiny/snapshots/<commit>/    links to them
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import pytest


def fill_cache(
    cache: Path, hub_id: str, revisions: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Make checkpoints the revisions of a Hub model, and `cache` the only place it is looked for.

    Args:
        revisions: branch or tag -> directory of the checkpoint.
    Returns:
        The model's directory in the cache.
    """
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    model = cache / f"models--{hub_id.replace('/', '--')}"
    for name in ("refs", "blobs", "snapshots"):
        (model / name).mkdir(parents=True, exist_ok=True)
    for branch, directory in revisions.items():
        move(model, branch, directory)
    return model


def move(model: Path, branch: str, directory: Path) -> str:
    """Have a branch stand at what a directory holds; returns the commit."""
    commit = commit_of(directory)
    snapshot = model / "snapshots" / commit
    for file in directory.rglob("*"):
        if file.is_file():
            blob = model / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
            blob.write_bytes(file.read_bytes())
            link = snapshot / file.relative_to(directory)
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.exists():
                link.symlink_to(os.path.relpath(blob, link.parent))
    (model / "refs" / branch).write_text(commit)
    return commit


def commit_of(directory: Path) -> str:
    """A commit that follows from the files."""
    digest = hashlib.sha1()
    for file in sorted(directory.rglob("*")):
        if file.is_file():
            digest.update(str(file.relative_to(directory)).encode() + file.read_bytes())
    return digest.hexdigest()
