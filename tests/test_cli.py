"""The command line: imports before a job starts, errors in options, and Ctrl-C."""

import json
import os
import signal
import subprocess
import sys
import time
from typing import Any
from unittest.mock import patch

import pytest
from PIL import Image

from unet_diffusion import __main__, __version__, cli
from unet_diffusion.commands import sample
from unet_diffusion.data.config import DataConfig

SLOW = (
    "torch",
    "diffusers",
    "datasets",
    "accelerate",
    "transformers",
    "skimage",
    "scipy",
    "matplotlib",
    "gradio",
    "onnx",
)
HELP = [[], ["--help"], *([name, "--help"] for name in cli.COMMANDS)]
MISTAKES = {
    "an option that does not exist": (["sample", "--stepz", "3"], "--stepz"),
    "a command that does not exist": (["train-dpm"], "train-dpm"),
    "a value that cannot be": (["sample", "--count", "0"], "count is 0, but must be an integer of at least 1"),
    "a run that does not exist": (["sample", "--run", "no/run"], "run is no/run, but there is no model_index.json"),
    "a run to segment with": (["segment", "--run", "no/run", "--inputs", "a.png"], "there is no model_index.json"),
    "a run to show": (["demo", "no/run"], "there is no model_index.json"),
    "a run to export": (["export", "no/run", "out"], "there is no model_index.json"),
    "data that do not exist": (["train-ddpm", "--data", "no/such/images"], "no/such/images"),
    "data to examine": (["doctor", "no/such/images"], "no/such/images"),
    "masks that do not exist": (
        ["train-segmentation", "--data", ".", "--masks", "no/masks", "--output", "../never"],
        "no/masks",
    ),
    "a model that does not exist": (["train-ddpm", "--model", "no-preset"], "there is no preset 'no-preset'"),
    "a model file that does not exist": (["train-ddpm", "--model", "no.json"], "there is no such file"),
    "an output that cannot be written": (
        ["train-ddpm", "--output", "file/run"],
        "file is not a folder",
    ),
}
REPORT = """
import contextlib, io, json, sys
from unet_diffusion.cli import main
reports = []
for arguments in json.load(sys.stdin):
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            main(arguments)
            status = 0
        except SystemExit as end:
            status = end.code
    reports.append({"printed": output.getvalue(), "status": status, "modules": sorted(sys.modules)})
json.dump(reports, sys.stdout)
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> list[dict[str, Any]]:
    """The output and the status of each call of `HELP` and `MISTAKES`, in one process, and its modules after it."""
    folder = tmp_path_factory.mktemp("answers")
    (folder / "file").write_text("a file")
    calls = [*HELP, *(arguments for arguments, _ in MISTAKES.values())]
    call = [sys.executable, "-c", REPORT]
    result = subprocess.run(call, input=json.dumps(calls), capture_output=True, text=True, cwd=folder, check=True)
    return json.loads(result.stdout)


@pytest.mark.parametrize("place", range(len(HELP)), ids=[" ".join(arguments) for arguments in HELP])
def test_help_imports_nothing_slow(answers, place):
    answer = answers[place]
    assert "usage: unet-diffusion" in answer["printed"]
    assert set(SLOW).isdisjoint(answer["modules"])
    assert answer["status"] == 0


def test_help_names_every_command_and_option(answers):
    printed = answers[HELP.index(["--help"])]["printed"]
    assert all(f" {name} " in printed for name in cli.COMMANDS)
    assert "--debug" in printed
    printed = answers[HELP.index(["train-segmentation", "--help"])]["printed"]
    for option in ("--data", "--steps", "--elastic", "--self-training-weight", "--debug", "--augment, --no-augment"):
        assert option in printed


@pytest.mark.parametrize("place", range(len(MISTAKES)), ids=MISTAKES)
def test_a_mistake_is_refused_before_anything_slow_is_imported(answers, place):
    answer, (_, message) = answers[len(HELP) + place], list(MISTAKES.values())[place]
    assert message in f"{answer['printed']}{answer['status']}".replace("\n", " ")
    assert set(SLOW).isdisjoint(answer["modules"])
    assert answer["status"] != 0


def test_version_and_the_package_as_a_program():
    call = [sys.executable, "-m", "unet_diffusion", "--version"]
    assert subprocess.run(call, capture_output=True, text=True, check=True).stdout.strip() == __version__


def test_an_empty_argument_and_an_output_among_the_data_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="an argument is empty, perhaps a variable of the shell"):
        cli.main(["train-ddpm", "--output", ""])
    (tmp_path / "images").mkdir()
    Image.new("L", (8, 8)).save("images/0.png")
    for command in ("train-ddpm", "train-classifier", "train-segmentation"):
        with pytest.raises(SystemExit, match="output is images/runs/new, in the folder images of the data"):
            cli.main([command, "--data", "images", "--output", "images/runs/new"])
    assert not (tmp_path / "images" / "runs").exists()


def test_a_tilde_is_the_home_folder_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(SystemExit, match=f"run is {tmp_path}/mine, but there is no model_index.json"):
        cli.main(["sample", "--run=~/mine"])
    with pytest.raises(SystemExit, match=f"model is '{tmp_path}/mine.json', but there is no such file"):
        cli.main(["train-ddpm", "--model=~/mine.json"])
    assert DataConfig(data="~/images", cache_dir="~/cache").cache_dir == str(tmp_path / "cache")


def test_ctrl_c_is_answered_while_the_command_line_is_imported(capsys):
    with patch.object(cli, "main", side_effect=KeyboardInterrupt), pytest.raises(SystemExit, match="130"):
        __main__.main()
    assert capsys.readouterr().err == "unet-diffusion: stopped by Ctrl-C.\n"


@pytest.mark.parametrize("module", ["unet_diffusion.cli", "unet_diffusion.commands.doctor.command"])
def test_ctrl_c_is_answered_although_a_library_that_is_imported_turns_it_into_another_error(tmp_path, module):
    """As NumPy does with its C extensions; the module that is imported first stands for it here."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.abc, os, signal, sys\n"
        "class Finder(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {module!r}:\n"
        "            try:\n"
        "                os.kill(os.getpid(), signal.SIGINT)\n"
        "            except KeyboardInterrupt:\n"
        "                raise ImportError('failed to import') from None\n"
        "sys.meta_path.insert(0, Finder())\n"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    call = [sys.executable, "-m", "unet_diffusion", "doctor", str(tmp_path)]
    done = subprocess.run(call, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert (done.returncode, done.stderr) == (cli.INTERRUPTED, "unet-diffusion: stopped by Ctrl-C.\n")


def test_importing_the_package_is_quick_since_ctrl_c_is_not_answered_until_then():
    code = "import sys; before = set(sys.modules); import unet_diffusion.__main__; print(*set(sys.modules) - before)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"importlib.abc", "importlib.resources", "tempfile", "random"}.isdisjoint(result.stdout.split())


def test_an_error_is_one_sentence_and_with_debug_a_traceback(capsys):
    with patch.object(sample, "generation_pipeline", side_effect=RuntimeError("the disk is on fire")):
        arguments = ["sample", "--run", "here", "--output", "there"]
        with patch.object(cli.Sample, "check_paths"), patch.object(sample.Sample, "check_paths"):
            with pytest.raises(SystemExit, match=r"^unet-diffusion sample: the disk is on fire$"):
                cli.main(arguments)
            with pytest.raises(RuntimeError, match="the disk is on fire"):
                cli.main([*arguments, "--debug"])


def test_ctrl_c_ends_a_command_with_one_sentence(tmp_path):
    """The signal is sent while the job runs; here, the job waits forever."""
    code = (
        "import time\n"
        "from unittest.mock import patch\n"
        "from unet_diffusion import cli\n"
        "def wait(options):\n"
        "    print('waiting', flush=True)\n"
        "    time.sleep(60)\n"
        "with patch.object(cli.Doctor, 'check_paths', wait):\n"
        "    cli.main(['doctor', 'somewhere'])\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "waiting\n"
    time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert errors == "unet-diffusion doctor: stopped by Ctrl-C.\n"
    assert process.returncode == cli.INTERRUPTED
