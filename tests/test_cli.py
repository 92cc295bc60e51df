"""The command line: imports before a job starts, errors in options, and Ctrl-C."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import pytest
from PIL import Image

from unet_diffusion import __main__, __version__, cli
from unet_diffusion.commands import sample

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
REPORT = """
import json, sys
from unet_diffusion.cli import main
try:
    main(sys.argv[2:])
except SystemExit as end:
    status = end.code
else:
    status = 0
json.dump({"status": status, "modules": sorted(sys.modules)}, open(sys.argv[1], "w"))
"""


def answered(tmp_path: Path, *arguments: str) -> tuple[str, str, dict[str, object]]:
    """The output of a command, its status, and the modules that it has imported."""
    report = tmp_path / "report.json"
    call = [sys.executable, "-c", REPORT, str(report), *arguments]
    result = subprocess.run(call, capture_output=True, text=True, cwd=tmp_path, check=True)
    return result.stdout, result.stderr, json.loads(report.read_text())


@pytest.mark.parametrize("arguments", [["--help"], [], *([name, "--help"] for name in cli.COMMANDS)], ids=" ".join)
def test_help_imports_nothing_slow(arguments, tmp_path):
    printed, _, report = answered(tmp_path, *arguments)
    assert "usage: unet-diffusion" in printed
    assert set(SLOW).isdisjoint(report["modules"])
    assert report["status"] == 0


def test_help_names_every_command_and_option(tmp_path):
    printed, _, _ = answered(tmp_path, "--help")
    assert all(f" {name} " in printed for name in cli.COMMANDS)
    assert "--debug" in printed
    printed, _, _ = answered(tmp_path, "train-segmentation", "--help")
    for option in ("--data", "--steps", "--elastic", "--self-training-weight", "--debug", "--augment, --no-augment"):
        assert option in printed


MISTAKES = {
    "an option that does not exist": (["sample", "--stepz", "3"], "--stepz"),
    "a command that does not exist": (["train-dpm"], "train-dpm"),
    "a value that cannot be": (["sample", "--count", "0"], "count is 0, but must be at least 1"),
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
    "an output that cannot be written": (["train-ddpm", "--output", "report.json/run"], "report.json"),
}


@pytest.mark.parametrize(("arguments", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_refused_before_anything_slow_is_imported(arguments, message, tmp_path):
    (tmp_path / "report.json").write_text("a file")
    printed, errors, report = answered(tmp_path, *arguments)
    assert message in f"{printed}{errors}{report['status']}".replace("\n", " ")
    assert set(SLOW).isdisjoint(report["modules"])
    assert report["status"] != 0


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


def test_ctrl_c_is_answered_while_the_command_line_is_imported(capsys):
    with patch.object(cli, "main", side_effect=KeyboardInterrupt), pytest.raises(SystemExit, match="130"):
        __main__.main()
    assert capsys.readouterr().err == "unet-diffusion: stopped by Ctrl-C.\n"


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
