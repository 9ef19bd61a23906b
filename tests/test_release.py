"""What surrounds a release: workflows that run the project's own targets, citation, changelog."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from shortllm import __version__, criteria

REPOSITORY = Path(__file__).parents[1]
WORKFLOWS = REPOSITORY / ".github" / "workflows"


def workflow(name: str) -> dict[Any, Any]:
    content: dict[Any, Any] = yaml.safe_load((WORKFLOWS / name).read_text(encoding="utf-8"))
    return content


def steps(content: dict[Any, Any]) -> list[dict[str, Any]]:
    return [step for job in content["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("name", sorted(one.name for one in WORKFLOWS.iterdir()))
def test_workflows_run_what_there_is(name: str) -> None:
    content = workflow(name)
    assert content[True] and content["permissions"] == {"contents": "read"}  # `on` reads as true
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
    commands = [step["run"] for step in steps(content) if "run" in step]
    assert commands
    for command in commands:
        if command.startswith("make "):
            assert set(command.split()[1:]) <= targets
        elif not command.startswith("test "):
            assert (REPOSITORY / command).stat().st_mode & 0o111
    for step in steps(content):
        if "uses" in step:
            assert re.search(r"@(release/)?v\d+$", step["uses"])


def test_the_tests_run_on_the_oldest_and_newest_python() -> None:
    [listed] = re.findall(
        r'requires-python = ">=([\d.]+)"', (REPOSITORY / "pyproject.toml").read_text()
    )
    known = re.findall(
        r'"Programming Language :: Python :: (3\.\d+)"', (REPOSITORY / "pyproject.toml").read_text()
    )
    for file, job in (("tests.yml", "pinned"), ("nightly.yml", "all")):
        matrix = workflow(file)["jobs"][job]["strategy"]["matrix"]["python"]
        assert matrix == [listed, known[-1]] == [known[0], known[-1]]


def test_only_the_publishing_job_may_ask_for_an_identity() -> None:
    content = workflow("publish.yml")
    assert content[True] == {"push": {"tags": ["v*"]}}
    allowed = {name: job.get("permissions") for name, job in content["jobs"].items()}
    assert allowed == {"test": None, "build": None, "publish": {"id-token": "write"}}
    assert not any("run" in step for step in content["jobs"]["publish"]["steps"])
    assert "make release-check" in [step.get("run") for step in content["jobs"]["build"]["steps"]]


def test_the_citation_names_the_developers_and_the_paper() -> None:
    cited = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))
    project = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    assert cited["cff-version"] == "1.2.0" and cited["title"] == "shortllm" and cited["message"]
    assert cited["authors"] == [{"name": "The shortllm developers"}]
    assert f'license = "{cited["license"]}"' in project
    assert cited.get("version", __version__) == __version__
    [paper] = cited["references"]
    known = criteria.get("ppl").paper
    assert known is not None
    names = [f"{one['family-names']}, {one['given-names']}" for one in paper["authors"]]
    assert " and ".join(names) == known.authors
    found = (paper["type"], paper["title"], str(paper["year"]))
    assert found == ("article", known.title, known.year)
    assert paper["url"] == known.url


def test_the_changelog_says_what_is_in_this_version() -> None:
    text = (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
    heads = re.findall(r"^## \[(.+?)\](?: - (\d{4}-\d\d-\d\d))?$", text, re.MULTILINE)
    assert heads[0] == ("Unreleased", "") and len(heads) == len(re.findall("^## ", text, re.M))
    assert all(date for _, date in heads[1:])
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    found = re.findall(r"^### (.+)$", text, re.MULTILINE)
    assert found and set(found) <= kinds
