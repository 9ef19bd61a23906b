"""Caches as huggingface_hub and datasets lay them out, filled by hand: nothing is downloaded.

models--acme--tiny/refs/main              the commit of the branch
models--acme--tiny/blobs/<sha256>         contents
models--acme--tiny/snapshots/<commit>/    links to them
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest


def fill_cache(
    cache: Path, hub_id: str, revisions: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Make checkpoints the revisions of a Hub model, and `cache` the only place to look for it.

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
    """Set a branch to the content of a directory; returns the commit."""
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


def fill_datasets_cache(
    cache: Path, hub_id: str, rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Make rows the split `test` of a Hub data set, and `cache` the only place to look for it."""
    import datasets

    source = cache / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    datasets.load_dataset("json", data_files={"test": str(source)}, cache_dir=str(cache / "json"))
    [info] = (cache / "json").rglob("dataset_info.json")
    owner, name = hub_id.split("/")
    target = cache / "sets" / f"{owner}___{name}" / "default" / "0.0.0" / ("0" * 40)
    target.parent.mkdir(parents=True)
    info.parent.rename(target)
    (target / "json-test.arrow").rename(target / f"{name}-test.arrow")
    about = json.loads((target / "dataset_info.json").read_text())
    (target / "dataset_info.json").write_text(json.dumps({**about, "dataset_name": name}))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(cache / "sets"))
