"""The code blocks of the documents run, and their links lead somewhere."""

import ast
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from pydoc import locate

import pytest
import yaml

from tests.package.documentation import (
    ADDED,
    DOCUMENTS,
    INSTEAD,
    ROOT,
    SHOWN,
    TYPED,
    blocks,
    commands,
    name_of,
    type_document,
)
from tests.package.documented_images import RUNS, make_images, train_runs
from unet_diffusion import cli

FAST = ("README.md",)  # typed by default, the others with -m slow
LEFT = {"docs/diffusers.md": "mask.size == (30, 40) and len(images) == 2"}  # conditions that hold after the last block
BLOCKS = [block for document in DOCUMENTS for block in blocks(document)]
MARKED = [block for block in BLOCKS if block.reason is not None]
LINKING = [*DOCUMENTS, ROOT / "CHANGELOG.md"]


@pytest.fixture(scope="module")
def named(tmp_path_factory) -> Path:
    """A folder with all files that the documents use."""
    folder = tmp_path_factory.mktemp("named")
    make_images(folder)
    return folder


@pytest.fixture(scope="module")
def finished(named) -> Path:
    """A folder with the runs that documents use without training them."""
    with contextlib.chdir(named):
        train_runs()
    return named / "finished"


@pytest.mark.parametrize(
    "document",
    [
        pytest.param(path, marks=() if name_of(path) in FAST else pytest.mark.slow, id=name_of(path))
        for path in DOCUMENTS
        if any(block.is_run for block in blocks(path))
    ],
)
def test_every_block_can_be_typed(document, named, tmp_path, monkeypatch, request):
    shutil.copytree(named, tmp_path / "here", symlinks=True, ignore=shutil.ignore_patterns("finished"))
    monkeypatch.chdir(tmp_path / "here")
    for run in RUNS:
        if run in document.read_text() and f"--output {run}" not in document.read_text():
            finished = request.getfixturevalue("finished")
            shutil.copytree(finished / run, run)
    names = type_document(document)
    assert eval(LEFT.get(name_of(document), "True"), names)


@pytest.mark.parametrize("block", MARKED, ids=str)
def test_a_block_that_is_not_run_says_why_and_could_be_typed(block, monkeypatch, tmp_path):
    clone = tmp_path / "clone"
    clone.mkdir()
    monkeypatch.chdir(clone)
    for name in ("dsb2018", "wbc", "isbi2012"):  # the measured sets, as the documents have them beside the clone
        (tmp_path / "shared/data" / name).mkdir(parents=True)
        for part in ("train", "validation", "test"):
            (tmp_path / "shared/data" / name / f"{part}.parquet").touch()
    assert len(block.reason) > 5
    assert block.language in TYPED, "what is shown only needs no mark"
    if block.language == "python":
        ast.parse(block.text)
    else:
        for command in commands(block.text):
            command.parse()


def test_every_mark_stands_directly_before_a_block_and_every_fence_is_known():
    for document in DOCUMENTS:
        text = document.read_text()
        here = [block for block in BLOCKS if block.document == document]
        assert text.count("<!-- not run:") == sum(block.reason is not None for block in here), document
        assert len(re.findall(r"^ *(?:```|~~~)", text, re.M)) == 2 * len(here), document
    for block in BLOCKS:
        assert block.language in (*TYPED, *SHOWN), block


def test_no_command_hides_in_a_block_that_is_shown_only():
    for block in BLOCKS:
        if block.language in SHOWN:
            commanding = r"^(\w+=\S+ )*(python|pip|make|accelerate|torchrun|unet-diffusion)\b(?!/)"
            assert not re.search(commanding, block.text, re.M), block


def test_data_that_is_shown_can_be_read():
    read = {"json": json.loads, "yaml": yaml.safe_load}
    for block in BLOCKS:
        if block.language in read:
            read[block.language](block.text)


def test_every_change_before_typing_applies_to_a_block():
    typed = {name_of(document): "" for document in DOCUMENTS}
    for block in BLOCKS:
        if block.is_run:
            typed[name_of(block.document)] += block.text
    for name, changes in INSTEAD.items():
        for written in changes:
            assert written in typed[name], (name, written)
    for command in ADDED:
        assert any(f"unet-diffusion {command} " in text for text in typed.values()), command


@pytest.mark.parametrize("document", LINKING, ids=name_of)
def test_links_lead_somewhere(document):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", document.read_text(), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if ":" in target:
            assert re.match(r"https://[\w.-]+\.\w+(/|$)", target), target
            continue
        path, _, anchor = target.partition("#")
        page = (document.parent / path).resolve() if path else document
        assert page.exists(), target
        assert not anchor or anchor in anchors(page), target


def anchors(page: Path) -> set[str]:
    """The link targets of a page: its headings, as git hosts name them, and the objects that it documents."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    headings = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in re.findall(r"^#+ (.*)$", text, re.M)]
    objects = re.findall(r"^::: ([\w.]+)$", text, re.M)
    members = [f"{name}.{member}" for name in objects for member in vars(locate(name))]
    return {*(heading.strip().replace(" ", "-") for heading in headings), *objects, *members}


def test_the_readme_names_every_preset_and_no_other():
    named = set(re.findall(r"^\| `([\w-]+)` \|", (ROOT / "README.md").read_text(), re.M))
    assert named == {path.stem for path in (ROOT / "unet_diffusion" / "presets").glob("*.json")}


def test_the_documents_show_every_command():
    shown = {command.job for block in BLOCKS if block.language in ("bash", "sh") for command in commands(block.text)}
    assert shown >= set(cli.COMMANDS)


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_fetches_nothing(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}  # a note by the makers of the theme, about another program
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0 and "WARNING" not in built.stderr, built.stderr
    pages = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.html")}
    listed = re.findall(r"^ +- [^:]+: ([\w/-]+)\.md$", (ROOT / "mkdocs.yml").read_text(), re.M)
    assert pages == {f"{name}.html" for name in [*listed, "404"]}
    for page in pages:
        text = (tmp_path / page).read_text()
        assert not re.search(r"<(script|img)[^>]* src=\"?(https?:)?//|<link[^>]* rel=\"?stylesheet\"?[^>]*//", text), (
            page
        )
