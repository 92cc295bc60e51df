"""What the documents say can be typed, and what they link to is there."""

import re
import shlex
from pathlib import Path

import pytest
import tyro

from unet_diffusion import cli

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands() -> list[str]:
    """Every `unet-diffusion` line of a shell block, continuations joined."""
    found = []
    for document in DOCUMENTS:
        for block in re.findall(r"```bash\n(.*?)```", document.read_text(), re.S):
            lines = block.replace("\\\n", " ").splitlines()
            found += [line for line in lines if re.match(r"(unet-diffusion|accelerate launch scripts/)", line)]
    return found


@pytest.mark.parametrize("line", commands())
def test_every_command_in_the_documents_parses(line):
    words = shlex.split(line.replace("accelerate launch scripts/", "unet-diffusion ", 1), comments=True)
    name = words[1].removesuffix(".py").replace("_", "-")
    options, _ = cli.COMMANDS[name]
    tyro.cli(options, args=words[2:], config=(tyro.conf.OmitArgPrefixes,))


def test_there_are_commands_in_the_documents():
    assert len(commands()) >= 6


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_local_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text()):
        assert target.startswith("https://") or (document.parent / target).exists(), target


def test_the_readme_names_every_preset_and_no_other():
    named = set(re.findall(r"^\| `([\w-]+)` \|", (ROOT / "README.md").read_text(), re.M))
    assert named == {path.stem for path in (ROOT / "unet_diffusion" / "presets").glob("*.json")}


def test_the_page_on_diffusers_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "diffusers.md").read_text(), re.S)
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)  # one after the other, as a reader would
    assert names["mask"].size == (30, 40) and len(names["images"]) == 2
