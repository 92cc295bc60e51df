"""Damaged checkpoints are named and the one before is used; a second run in a folder is refused."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.reliability import children
from tests.reliability.places import Place, die_at
from tests.reliability.tiny_runs import Options, differences, into, train
from unet_diffusion.training import checkpoints, run_folder
from unet_diffusion.training.checkpoints import DamagedCheckpoint, load_checkpoint, saved_checkpoints, sha256

PROMISE = "No half-written state"
FILES = ("checksums.json", "ema.safetensors", "model.safetensors", "optimizer.safetensors", "state.json")
HARMS = ("flipped", "truncated", "emptied", "removed")
LOST = "ema.safetensors"  # the part that is removed together with its checksum
FLIPS = 100  # of one bit, in each file

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def stopped(whole_run, tmp_path_factory) -> Path:
    """A run of 8 steps with checkpoints of steps 4 and 6, and a temporary folder of the one of step 8."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    process = children.start(folder.with_suffix(".log"), _train_to_death, into(whole_run.options, folder))
    children.end(process)
    assert process.exitcode == -signal.SIGKILL
    names = [path.name.rpartition("-")[2] for path in sorted((folder / "checkpoints").iterdir())]
    assert names == ["00000008", "00000004", "00000006"]
    return folder


def _train_to_death(options: Options) -> None:
    die_at(Place("checkpoint 8 before it is read back", "_save", checkpoints, "load_checkpoint", 4))
    train(options)


def test_one_bit_flipped_in_a_file_of_a_checkpoint(stopped, tmp_path, record_property):
    newest = saved_checkpoints(stopped / "checkpoints")[-1]
    assert tuple(sorted(path.name for path in newest.iterdir())) == FILES
    draw, undetected, folder = random.Random(0), [], tmp_path / "checkpoint"
    for name in FILES:
        for _ in range(FLIPS):
            shutil.copytree(newest, folder)
            bit = flip(folder / name, draw)
            try:
                load_checkpoint(folder)
                undetected.append(f"{name}, bit {bit}")
            except DamagedCheckpoint:
                pass
            shutil.rmtree(folder)
    assert undetected == []
    record_property(
        "figure", f"{FLIPS * len(FILES)} of {FLIPS * len(FILES)} detected, {FLIPS} in each of {len(FILES)} files"
    )


def flip(file: Path, draw: random.Random) -> int:
    """Flips a random bit of a file; returns its place."""
    data = bytearray(file.read_bytes())
    bit = draw.randrange(8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)
    return bit


@pytest.mark.parametrize(
    ("harm", "name"),
    [*((harm, name) for name in FILES for harm in HARMS), ("removed with its checksum", LOST), ("emptied", ".")],
)
def test_the_newest_checkpoint_damaged(harm, name, whole_run, stopped, tmp_path, record_property):
    record_property(
        "fault",
        "the newest checkpoint damaged: each file flipped, truncated, emptied, removed, or the whole folder emptied",
    )
    folder, log = tmp_path / "run", tmp_path / "log"
    shutil.copytree(stopped, folder)
    newest = saved_checkpoints(folder / "checkpoints")[-1]
    damage(newest, harm, name)
    assert children.run(log, train, into(whole_run.options, folder)) == ""
    assert f"{newest.name} is damaged" in log.read_text() and "going back to the one before" in log.read_text()
    assert differences(folder, whole_run.folder) == []
    record_property("figure", "named, the one before used, the run ended bit-equal")


def damage(checkpoint: Path, harm: str, name: str) -> None:
    """Damages one file of a checkpoint, or all of it if the name is a dot."""
    file, draw = checkpoint / name, random.Random(f"{harm} {name}")
    if name == ".":
        shutil.rmtree(checkpoint)
        checkpoint.mkdir()
    elif harm == "flipped":
        flip(file, draw)
    elif harm == "truncated":
        file.write_bytes(file.read_bytes()[: draw.randrange(1, file.stat().st_size)])
    elif harm == "emptied":
        file.write_bytes(b"")
    else:
        file.unlink()
    if harm == "removed with its checksum":
        checksums = {path.name: sha256(path) for path in checkpoint.iterdir() if path.name != "checksums.json"}
        (checkpoint / "checksums.json").write_text(json.dumps(checksums))


def test_all_checkpoints_damaged(whole_run, stopped, tmp_path, record_property):
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    for path in saved_checkpoints(folder / "checkpoints"):
        flip(path / "model.safetensors", random.Random(2))
    problem = children.run(tmp_path / "log", train, into(whole_run.options, folder))
    assert "all 2 checkpoints in" in problem
    record_property("figure", f'the run ends with "{problem.partition(": ")[2].replace(f"{tmp_path}/", "")}"')


def test_two_runs_in_one_folder(whole_run, tmp_path, record_property):
    """The second starts while the first is held up."""
    options = into(whole_run.options, tmp_path / "run")
    first = children.start(tmp_path / "log", train, options)
    while not saved_checkpoints(tmp_path / "run" / "checkpoints") and first.exitcode is None:
        time.sleep(0.001)
    os.kill(first.pid, signal.SIGSTOP)
    problem = children.run(tmp_path / "second", _train_impatiently, options)
    os.kill(first.pid, signal.SIGCONT)
    assert children.end(first) == ""
    assert "another process is training" in problem
    assert differences(tmp_path / "run", whole_run.folder) == []
    record_property("figure", "the second refused, the first ended bit-equal")


def _train_impatiently(options: Options) -> None:
    run_folder.WORKERS_END = 0.5
    train(options)
