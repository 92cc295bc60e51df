"""No half-written state: checkpoints that are damaged, disks that are full, writers that die, and a second run."""

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from fault_checks import children, disk_full, writes
from fault_checks.finding import Finding
from fault_checks.places import Place, die_at
from fault_checks.tiny_runs import Options, differences, into, tiny_runs, train

from unet_diffusion.training import checkpoints, run_folder
from unet_diffusion.training.checkpoints import DamagedCheckpoint, load_checkpoint, saved_checkpoints, sha256

PROMISE = "No half-written state"
HARMS = ("flipped", "truncated", "emptied", "removed")
LOST = "ema.safetensors"  # the part that is removed together with its checksum
FLIPS, FLIPS_REDUCED = 100, 40  # of one bit, in each file
LARGE_WRITES, LARGE_WRITES_REDUCED = 20, 2
COST = 30_000_000  # values in each of three parts, about as many as the network of 2015 has


def checks(reduced: bool, work: Path) -> Iterator[Finding]:
    """Damages what a run has written, fills its disk, kills its writers, and starts it twice."""
    torch.set_num_threads(1)
    options = tiny_runs(work, steps=8)["ddpm"]
    stopped = work / "stopped"
    problem = children.run(work / "log", train, into(options, work / "whole"))
    problem = problem or died(work / "log", into(options, stopped))
    if problem:
        yield Finding(PROMISE, "a run to damage", problem, held=False)
        return
    yield flips(stopped, work / "flips", FLIPS_REDUCED if reduced else FLIPS)
    yield damages(options, stopped, work / "damaged", reduced)
    yield all_damaged(options, stopped, work / "all")
    yield killed_writes(work / "writes", reduced)
    yield from full_disks(options, work, reduced)
    yield second_run(options, work / "second")
    if not reduced:
        yield cost(work)


def died(log: Path, options: Options) -> str:
    """Leaves a run of 8 steps with checkpoints of steps 4 and 6, and a temporary folder of the one of step 8."""
    process = children.start(log, _train_to_death, options)
    children.end(process)
    names = [path.name.rpartition("-")[2] for path in sorted((options.output / "checkpoints").iterdir())]
    killed = process.exitcode == -signal.SIGKILL
    return "" if killed and names == ["00000008", "00000004", "00000006"] else f"died={killed} left {names}"


def _train_to_death(options: Options) -> None:
    die_at(Place("checkpoint 8 before it is read back", "_save", checkpoints, "load_checkpoint", 4))
    train(options)


def flips(stopped: Path, folder: Path, count: int) -> Finding:
    """Flips one bit of each file of a checkpoint, again and again, and reads it."""
    (newest,) = saved_checkpoints(stopped / "checkpoints")[-1:]
    draw, unseen, files = random.Random(0), [], sorted(newest.iterdir())
    for file in files:
        for _ in range(count):
            shutil.copytree(newest, folder)
            place = flip(folder / file.name, draw)
            try:
                load_checkpoint(folder)
                unseen.append(f"{file.name}, bit {place}")
            except DamagedCheckpoint:
                pass
            shutil.rmtree(folder)
    total = count * len(files)
    return _finding(
        f"one bit flipped in each of the {len(files)} files of a checkpoint, {count} times",
        f"{total} of {total} detected",
        [f"not detected: {', '.join(unseen)}"] if unseen else [],
    )


def flip(file: Path, draw: random.Random) -> int:
    """Flips a random bit of a file; returns which."""
    data = bytearray(file.read_bytes())
    place = draw.randrange(8 * len(data))
    data[place // 8] ^= 1 << place % 8
    file.write_bytes(data)
    return place


def damages(options: Options, stopped: Path, folder: Path, reduced: bool) -> Finding:
    """Damages the newest checkpoint of a stopped run in one way after the other, and goes on with it."""
    (newest,) = saved_checkpoints(stopped / "checkpoints")[-1:]
    names = sorted(path.name for path in newest.iterdir())
    cases = [(harm, name) for name in names for harm in HARMS]
    draw, problems = random.Random(1), []
    if reduced:
        cases = [(harm, names[number]) for number, harm in enumerate(HARMS)]
    cases += [("removed with its checksum", LOST), ("emptied", ".")]
    for harm, name in cases:
        shutil.copytree(stopped, folder)
        damage(folder / "checkpoints" / newest.name, harm, name, draw)
        log = folder.with_suffix(".log")
        problem = children.run(log, train, into(options, folder))
        said = log.read_text()
        if problem:
            problems.append(f"{name} {harm}: {problem}")
        elif f"{newest.name} is damaged" not in said or "going back to the one before" not in said:
            problems.append(f"{name} {harm}: not named")
        elif found := differences(folder, folder.with_name("whole")):
            problems.append(f"{name} {harm}: {', '.join(found)}")
        shutil.rmtree(folder)
        log.unlink()
    return _finding(
        "the newest checkpoint damaged: each file flipped, truncated, emptied, removed, or the whole folder emptied",
        f"{len(cases)} of {len(cases)} named, the one before used, the run ended bit-equal",
        problems,
    )


def damage(checkpoint: Path, harm: str, name: str, draw: random.Random) -> None:
    """Harms one file of a checkpoint, or all of it where the name is a dot."""
    file = checkpoint / name
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


def all_damaged(options: Options, stopped: Path, folder: Path) -> Finding:
    """Damages all checkpoints of a stopped run, and tries to go on."""
    shutil.copytree(stopped, folder)
    for path in saved_checkpoints(folder / "checkpoints"):
        flip(path / "model.safetensors", random.Random(2))
    problem = children.run(folder.with_suffix(".log"), train, into(options, folder))
    expected = "all 2 checkpoints in"
    return _finding(
        "all checkpoints damaged",
        f'the run ends with "{problem.partition(": ")[2].replace(str(folder.parent), "…")}"',
        [] if expected in problem else [f"the run said {problem!r}"],
    )


def killed_writes(folder: Path, reduced: bool) -> Finding:
    """Kills writers of checkpoints and of an export before each call to the file system, and at random moments."""
    folder.mkdir()
    checkpoint_calls, problems = writes.checkpoint_writes(folder / "checkpoint")
    export_calls, found = writes.export_writes(folder / "export")
    died, wrong = writes.large_writes(folder / "large", LARGE_WRITES_REDUCED if reduced else LARGE_WRITES)
    return _finding(
        "a process killed before each of its calls to the file system while it writes a checkpoint or an export, and "
        "at random moments of the writing of a checkpoint of 24 MB",
        f"{checkpoint_calls} + {export_calls} + {died} kills: the newest checkpoint was whole each time, the export "
        "was whole or was no pipeline",
        problems + found + wrong,
    )


def full_disks(options: Options, work: Path, reduced: bool) -> Iterator[Finding]:
    """Lets the disk get full in each phase of a run."""
    for number, case in enumerate(disk_full.CASES):
        if reduced and number in (1, 4):
            continue
        disk = work / f"disk-{number}"
        with disk_full.small_disk(disk) as mounted:
            sentence, problems = disk_full.run_on_full_disk(options, disk, work / "whole", case, mounted)
        kind = "a real file system of 16 MB" if mounted and case.phase != "_log" else "a limit of file sizes"
        yield _finding(
            f"disk full while writing {case.name}, {kind}",
            f'"{sentence}"; earlier checkpoints whole, nothing left over; with room again ended bit-equal',
            problems,
        )


def second_run(options: Options, folder: Path) -> Finding:
    """Starts a run in a folder where another one, which is held up, is training."""
    log, problems, these = folder.with_suffix(".log"), [], into(options, folder)
    first = children.start(log, train, these)
    while not saved_checkpoints(folder / "checkpoints") and first.exitcode is None:
        time.sleep(0.001)
    os.kill(first.pid or 0, signal.SIGSTOP)
    problem = children.run(folder.with_suffix(".second"), _train_impatient, these)
    os.kill(first.pid or 0, signal.SIGCONT)
    if "another process is training" not in problem:
        problems.append(f"the second run said {problem!r}")
    if problem := children.end(first):
        problems.append(f"the first run: {problem}")
    elif found := differences(folder, folder.with_name("whole")):
        problems.append(f"the first run: {', '.join(found)}")
    return _finding("two runs in one folder", "the second refused, the first ended bit-equal", problems)


def _train_impatient(options: Options) -> None:
    run_folder.WORKERS_END = 0.5
    train(options)


def cost(work: Path) -> Finding:
    """What the care costs: waiting until the disk has a checkpoint, and reading it back."""
    times = writes.seconds_of_a_write(work, COST)
    whole = times["as it is"]
    return _finding(
        f"a checkpoint of {3 * 4 * COST / 1e6:.0f} MB",
        f"{whole:.2f} s, of them {whole - times['not flushed']:.2f} s until the disk has it, and "
        f"{whole - times['not read back']:.2f} s to read it back and compare",
        [],
    )


def _finding(check: str, figure: str, problems: list[str]) -> Finding:
    return Finding(PROMISE, check, "; ".join(problems) or figure, held=not problems)
