"""The code blocks of the documents, and functions that type them one after the other.

A block marked `python`, `bash` or `sh` is typed, unless a comment directly before it gives a reason against it:
`<!-- not run: REASON -->`. Its commands are then only parsed. Other blocks are only shown. `make` and `pip` are looked
up, never run.
"""

import re
import runpy
import shlex
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import tyro

from unet_diffusion import cli

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [
    *(path for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md") if path.exists()),
    *sorted((ROOT / "docs").rglob("*.md")),
]
TYPED = ("python", "bash", "sh")
SHOWN = ("text", "json", "yaml", "toml", "mermaid")
BLOCK = re.compile(
    r"(?:^ *<!-- not run:(?P<reason>.*?)-->\n)?^(?P<indent> *)```(?P<language>[^\n]*)\n(?P<text>.*?)^ *```$",
    re.M | re.S,
)

MODULES = "scripts."  # the prefix of scripts that are run as modules
OPTIONS = re.compile(r"tyro|unet_diffusion\.cli")  # in a script that takes options

# Text of documents, and the text that is typed instead, so that a document takes seconds.
INSTEAD = {
    "README.md": {
        "--crop-size 64": "--crop-size 16",
        "num_inference_steps=1000": "num_inference_steps=2",
        "unet(images)": "unet(torch.zeros(2, 3, 16, 16))",
    },
    "docs/choosing.md": {"--crop-size 64": "--crop-size 16"},
    "docs/commands.md": {"--crop-size 64": "--crop-size 16"},
    "docs/tutorial.md": {"--crop-size 64": "--crop-size 16"},
    "docs/segmentation.md": {"--crop-size 388": "--crop-size 16"},
    "docs/scaling.md": {"--output runs/mine --data path/to/shards": "--output runs/streamed --data path/to/shards"},
}
# Options that are added to commands for the same reason; the last one counts.
TRAINING = "--steps 2 --batch-size 4 --warmup-steps 1 --trackers"
ADDED = {
    "train-ddpm": f"--image-size 16 --preview-images 4 {TRAINING}",
    "train-classifier": f"--image-size 16 --widths 4 8 {TRAINING}",
    "train-segmentation": TRAINING,
    "tune-few-steps": TRAINING,
    "evaluate-generation": "--image-size 16 --count 64 --steps 2",
    "sample": "--steps 2",
}
TRAINED = ("train-ddpm", "train-segmentation")  # from `SMALL`, unless the document names the folder of a run
SMALL = {"channels": [8, 16], "head_channels": 8}


@dataclass(frozen=True)
class Block:
    """A fenced block of a document.

    Attributes:
        document: the file of the document.
        line: the line where the text starts, from 1.
        language: the word behind the fence.
        text: the text of the block.
        reason: why the block is not run; None if it is run.
    """

    document: Path
    line: int
    language: str
    text: str
    reason: str | None

    @property
    def is_run(self) -> bool:
        """Returns whether the block is typed: it has commands and is not marked."""
        return self.language in TYPED and self.reason is None

    def __str__(self) -> str:
        return f"{name_of(self.document)}:{self.line}"


def blocks(document: Path) -> list[Block]:
    """All fenced blocks of a document, in order."""
    text = document.read_text(encoding="utf-8")
    return [
        Block(
            document,
            text.count("\n", 0, match.start("text")) + 1,
            match["language"].strip(),
            textwrap.dedent(match["text"]),
            None if match["reason"] is None else match["reason"].strip(),
        )
        for match in BLOCK.finditer(text)
    ]


@dataclass(frozen=True)
class Command:
    """A command of a shell block.

    Attributes:
        line: the command as written, with continued lines joined.
        words: the words of the command, without settings of the environment.
    """

    line: str
    words: list[str]

    @property
    def place(self) -> int:
        """The index of the script, a path or a module, that Python, Accelerate or torchrun run; 0 in other commands."""
        if self.words[0] not in ("python", "accelerate", "torchrun") or self.words[1:3] == ["-m", "pytest"]:
            return 0
        return next((i for i, word in enumerate(self.words) if word.endswith(".py") or word.startswith(MODULES)), 0)

    @property
    def script(self) -> Path | None:
        """The file of the script, which must be there."""
        if not self.place:
            return None
        word = self.words[self.place]
        if not word.startswith(MODULES):
            script = ROOT / word
        else:
            assert self.words[self.place - 1] == "-m", f"python runs {word} as a module only after -m"
            folder = ROOT / word.replace(".", "/")
            script = folder / "__main__.py" if folder.is_dir() else folder.with_suffix(".py")
        assert script.is_file(), f"no script {script}"
        return script

    @property
    def job(self) -> str:
        """The command of `unet-diffusion` that is run, directly or by a script of its name; "" if there is none."""
        word = self.words[self.place]
        name = Path(word).stem.replace("_", "-") if word.endswith(".py") else "".join(self.words[1:2])
        return name if self.words[0] == "unet-diffusion" or name in cli.COMMANDS else ""

    def run(self) -> None:
        """Runs our commands and scripts in this process, which has imported everything, and others in a shell."""
        if self.words[0] == "unet-diffusion":
            assert self.job in cli.COMMANDS, f"no command {self.job}"
            cli.run(self.job, self.words[2:])
        elif self.script:
            with patch.object(sys, "argv", [str(self.script), *self.words[self.place + 1 :]]):
                runpy.run_path(str(self.script), run_name="__main__")
        else:
            subprocess.run(["bash", "-c", self.line], check=True)

    def parse(self) -> None:
        """Raises `AssertionError` or `SystemExit` if the command names a file, target or option that is not there."""
        if self.words[0] == "make":
            for word in self.words[1:]:
                name, variable, _ = word.partition("=")
                defined = re.escape(name) + (r" \?=" if variable else ":")
                assert re.search(f"^{defined}", (ROOT / "Makefile").read_text(), re.M), f"no target or variable {name}"
        elif self.words[:2] == ["pip", "install"]:
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            for name in re.findall(r"(?:\.|unet-diffusion)\[([\w,-]+)\]", self.line):
                assert set(name.split(",")) <= set(extras), f"no extra {name}"
        elif self.words[0] == "unet-diffusion" or (self.script and OPTIONS.search(self.script.read_text())):
            with pytest.raises(Parsed), patch.object(tyro, "cli", partial(options_only, tyro.cli)):
                self.run()

    def shortened(self) -> "Command":
        """The command with the options that make it short."""
        added = shlex.split(ADDED.get(self.job, ""))
        if self.job in TRAINED:
            model = self.words[self.words.index("--model") + 1] if "--model" in self.words else ""
            added = [*([] if model and Path(model).is_dir() else ["--model", "small.json"]), *added]
        return Command(self.line, [*self.words, *added])


class Parsed(Exception):
    """The options of a command were accepted."""


def options_only(parser: Callable[..., object], *args: object, **kwargs: object) -> None:
    """Replaces `tyro.cli`: ends a command when it has read its options."""
    parser(*args, **kwargs)
    raise Parsed


def commands(text: str) -> list[Command]:
    """The commands of a shell block."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.match(r"[A-Z_0-9]+=", words[0]):
            words = words[1:]
        if "unet_diffusion" in words and words[words.index("unet_diffusion") - 1] == "-m":
            words = ["unet-diffusion", *words[words.index("unet_diffusion") + 1 :]]  # the package as a program
        if words:
            found.append(Command(line, words))
    return found


def type_document(document: Path) -> dict[str, object]:
    """Runs all blocks of a document that are not marked, in the working directory.

    Returns:
        The names that the Python blocks have defined; the blocks share them.
    """
    instead = INSTEAD.get(name_of(document), {})
    names: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(document):
        if not block.is_run:
            continue
        text = block.text
        for written, typed in instead.items():
            text = text.replace(written, typed)
        if block.language == "python":
            exec(compile("\n" * (block.line - 1) + text, str(document), "exec"), names)
            continue
        for command in commands(text):
            if command.words[0] in ("make", "pip"):
                command.parse()
            else:
                command.shortened().run()
    return names


def name_of(document: Path) -> str:
    """The path of a document in the repository."""
    return str(document.relative_to(ROOT))
