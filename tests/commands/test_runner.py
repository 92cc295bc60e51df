"""Working through many files: what is made, skipped and made again, and what a kill, Ctrl-C or a full disk leaves."""

import csv
import io
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image

from unet_diffusion.commands.inputs import find_inputs
from unet_diffusion.commands.overlap import MOST_IMAGES, Room
from unet_diffusion.commands.runner import Work, work_through
from unet_diffusion.images.conversion import stored_image, stored_images
from unet_diffusion.images.figures import encoded_image
from unet_diffusion.randomness import keyed_generator

ENDINGS = (".png", "-overlay.png")
PLACES = ("a/x.png", "a/y.png", "b/c/x.png", "b/x.png")
TOO_MUCH = 2**60  # bytes, which no machine has
UNNAMED = {".lock", "test.jsonl"}  # with times, which differ from call to call


@dataclass
class Inverting:
    """A small command: inverts images, adds noise by their keys, and writes each twice.

    Attributes:
        folder: with the folder `images`; the outputs go to `out`.
        during: called with the key of each image before it is computed.
        computed: the keys of the images that were computed, in order.
    """

    folder: Path
    made_by: str = "one"
    overwrite: bool = False
    wanted: tuple[str, ...] = ENDINGS
    out: str = "out"
    images: str = "images"
    during: Callable[[str], Any] = lambda key: None
    computed: list[str] = field(default_factory=list)

    @property
    def output(self) -> Path:
        return self.folder / self.out

    @property
    def table(self) -> Path:
        return self.output / "sums.csv"

    def run(self, *others: str) -> list[str]:
        """Works through all images, and other inputs; returns the keys of those that were computed."""
        self.computed = []
        inputs = find_inputs([str(self.folder / self.images), *others], self.output)
        columns = ("file", "image", "sum", "error")
        work = Work(
            "test", self.made_by, ENDINGS, self.wanted, stored_images, self.compute, self.encode, ("sums.csv", columns)
        )
        work_through(inputs, self.output, work, self.overwrite, progress_bar)
        return self.computed

    def compute(self, image: torch.Tensor, key: str) -> torch.Tensor:
        assert threading.current_thread() is threading.main_thread()
        self.computed.append(key)
        self.during(key)
        noise = torch.randint(0, 256, image.shape, generator=keyed_generator(0, key), dtype=torch.uint8)
        return (255 - image) ^ noise

    def encode(self, image: torch.Tensor, result: torch.Tensor) -> tuple[list[bytes], tuple]:
        contents = [encoded_image(stored_image(each)) for each in (result, image)[: len(self.wanted)]]
        return contents, ((str(int(result.sum())),),)

    def rows(self) -> list[dict[str, str]]:
        return list(csv.DictReader(io.StringIO(self.table.read_text())))


def progress_bar(total: int) -> Any:
    return nullcontext(SimpleNamespace(update=lambda: None))


def tree(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in UNNAMED)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture
def command(tmp_path) -> Inverting:
    for seed, place in enumerate(PLACES):
        path = tmp_path / "images" / place
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(seed).integers(0, 256, (5, 4 + seed), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return Inverting(tmp_path)


@pytest.fixture
def undisturbed(command) -> dict[str, bytes]:
    """The files that an undisturbed call writes, in another folder."""
    whole = replace(command, out="undisturbed")
    whole.run()
    return tree(whole.output)


def in_child(job: Callable[[], Any]) -> int:
    """Does a job in a forked process; returns its exit status, negative for a signal."""
    process = multiprocessing.get_context("fork").Process(target=job)
    process.start()
    process.join(60)
    return process.exitcode


def test_outputs_and_rows_are_those_of_one_image_after_the_other(command, undisturbed):
    assert command.run() == ["a/x", "a/y", "b/c/x", "b/x"]
    for place, row in zip(PLACES, command.rows()):
        (image,) = stored_images(command.folder / "images" / place)
        expected = replace(command).compute(image, place.removesuffix(".png"))
        assert np.array_equal(np.asarray(Image.open(command.output / place)), expected[0])
        assert row == {
            "file": str(command.folder / "images" / place),
            "image": place,
            "sum": str(int(expected.sum())),
            "error": "",
        }
    assert tree(command.output) == undisturbed
    assert set(undisturbed) == {"sums.csv", *PLACES, *(place.replace(".png", "-overlay.png") for place in PLACES)}


@pytest.mark.parametrize("stride", [43, pytest.param(1, marks=pytest.mark.slow)])
def test_a_command_killed_before_any_of_its_writes_goes_on_and_ends_like_an_undisturbed_one(command, stride):
    """The process kills itself before its n-th call that changes a file, alone or after a call with other options."""
    shutil.rmtree(command.folder / "images" / "b")

    def die_before(number: int) -> None:
        count = itertools.count()

        def counted(real: Callable, *arguments: Any, **named: Any) -> Any:
            if next(count) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **named)

        for name in ("replace", "write", "fsync", "open", "mkdir", "ftruncate", "unlink"):
            setattr(os, name, partial(counted, getattr(os, name)))
        command.run()

    for has_earlier, wanted in ((False, ENDINGS), (True, ENDINGS), (True, ENDINGS[:1])):
        command.wanted = wanted
        undisturbed = replace(command, out=f"undisturbed {len(wanted)}")
        undisturbed.run()
        for number in itertools.count(step=stride):
            shutil.rmtree(command.output, ignore_errors=True)
            if has_earlier:
                replace(command, made_by="other options", wanted=ENDINGS).run()
            status = in_child(lambda number=number: die_before(number))
            lines = command.table.read_text() if command.table.exists() else ""
            assert all(line.count(",") == 3 for line in lines.splitlines()[:-1])
            command.run()
            assert tree(command.output) == tree(undisturbed.output), number
            if status == 0:
                break
            assert status == -signal.SIGKILL
        assert number > 20 * len(wanted)


def test_ctrl_c_keeps_what_is_finished_and_the_next_call_does_the_rest(command, undisturbed):
    threads = threading.enumerate()

    def interrupt(key: str) -> None:
        if key == "b/c/x":
            os.kill(os.getpid(), signal.SIGINT)

    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    with pytest.raises(KeyboardInterrupt, match="2 of 4 images are finished, and the same command goes on"):
        replace(command, during=interrupt).run()
    signal.signal(signal.SIGINT, handler)
    assert [row["image"] for row in command.rows()] == ["a/x.png", "a/y.png"]
    assert command.run() == ["b/c/x", "b/x"]
    assert tree(command.output) == undisturbed
    assert threading.enumerate() == threads


def test_the_table_has_whole_rows_of_all_finished_images_at_any_moment(command):
    def look(key: str) -> None:
        lines = [json.loads(line) for line in (command.output / "test.jsonl").read_text().splitlines()]
        finished = {line["image"] + ".png" for line in lines if "whole" in line}
        *whole, last = command.table.read_text().split("\n")
        assert last == "" and finished <= {row["image"] for row in csv.DictReader(whole)}

    for i in range(30):
        shutil.copy(command.folder / "images" / "a" / "x.png", command.folder / "images" / f"{i}.png")
    command.during = look
    assert len(command.run()) == 34


def changed(command: Inverting, name: str) -> Path:
    return command.folder / "images" / name


def touch(command: Inverting) -> None:
    for path in (changed(command, "a/x.png"), command.output / "a" / "y.png"):
        os.utime(path, ns=(1, 1))


def replace_input(command: Inverting) -> None:
    """Changes a pixel of an uncompressed image; size and time of writing stay."""
    path = changed(command, "a/y.png")
    before = path.stat()
    content = bytearray(path.read_bytes())
    Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    new = path.read_bytes().ljust(len(content), b"\0")
    path.write_bytes(new)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def copy_away(command: Inverting) -> None:
    """Copies inputs and outputs without their times, and moves the inputs' folder."""
    for name in ("images", "out"):
        shutil.copytree(command.folder / name, command.folder / "copy" / name, copy_function=shutil.copyfile)
    command.folder = command.folder / "copy"


def swap_options(command: Inverting) -> None:
    command.made_by = "two"


@pytest.mark.parametrize(
    ("change", "made_again"),
    [
        (lambda command: None, []),
        (touch, []),
        (copy_away, []),
        (replace_input, ["a/y"]),
        (lambda command: (command.output / "b/c/x-overlay.png").unlink(), ["b/c/x"]),
        (lambda command: (command.output / "sums.csv").unlink(), []),
        (lambda command: shutil.copy(changed(command, "a/x.png"), changed(command, "a/new.tif")), ["a/new"]),
        (swap_options, ["a/x", "a/y", "b/c/x", "b/x"]),
    ],
    ids=["nothing", "times", "a copy", "an input", "an output gone", "no table", "one more", "options"],
)
def test_only_what_has_changed_is_made_again(command, change, made_again):
    command.run()
    change(command)
    before = {path: path.stat().st_ino for path in command.output.rglob("*.png")}
    assert command.run() == made_again
    kept = {path for path in before if not any(str(path).startswith(str(command.output / key)) for key in made_again)}
    assert all(path.stat().st_ino == before[path] for path in kept)
    assert [row["file"] for row in command.rows()] == list(
        map(str, find_inputs([str(command.folder / "images")], command.output).paths)
    )
    fresh = replace(command, out="fresh")
    fresh.run()
    assert tree(command.output) == tree(fresh.output)
    assert command.run() == []


def test_outputs_without_an_ending_are_kept_by_a_call_that_does_not_want_it(command, undisturbed):
    plain = replace(command, wanted=ENDINGS[:1])
    assert plain.run() == ["a/x", "a/y", "b/c/x", "b/x"]
    assert set(tree(plain.output)) == {"sums.csv", *PLACES}
    command.run()
    assert plain.run() == []
    assert tree(plain.output) == undisturbed


def test_outputs_of_an_older_state_do_not_stay_beside_new_ones(command, undisturbed):
    command.run()
    edited = command.output / "b" / "x-overlay.png"
    edited.write_bytes(b"mine")
    plain = replace(command, wanted=ENDINGS[:1], made_by="two")
    assert len(plain.run()) == 4
    assert set(tree(plain.output)) == {"sums.csv", *PLACES, "b/x-overlay.png"}  # made by one, but for what was edited
    assert edited.read_bytes() == b"mine"
    edited.unlink()
    assert len(replace(command, made_by="two").run()) == 4
    assert tree(command.output) == undisturbed
    replace(plain, wanted=(".npy",), made_by="one").run()  # as super-resolution by a run of another depth
    assert set(tree(plain.output)) == {"sums.csv", *(place.replace(".png", ".npy") for place in PLACES)}


def test_outputs_of_the_same_state_stay_when_another_is_made_again(command, undisturbed):
    command.run()
    (command.output / "a" / "x.png").unlink()
    assert replace(command, wanted=ENDINGS[:1]).run() == ["a/x"]
    assert command.run() == []
    assert tree(command.output) == undisturbed


def test_all_outputs_stay_known_to_a_call_that_does_not_want_them_and_is_interrupted(command, undisturbed):
    def stop(key: str) -> None:
        if key == "b/c/x":
            raise KeyboardInterrupt

    command.run()
    plain = replace(command, wanted=ENDINGS[:1], made_by="two", during=stop)
    with pytest.raises(KeyboardInterrupt, match="2 of 4"):
        plain.run()
    assert set(tree(command.output)) == {"sums.csv", *PLACES, "b/c/x-overlay.png", "b/x-overlay.png"}
    assert len(replace(command, made_by="three").run()) == 4
    assert tree(command.output) == undisturbed


def test_an_input_that_is_refused_leaves_the_results_of_another_as_they_are(command):
    """Of its name with other content, of one whose overlay has its name, and of its content but without memory."""

    def run_out_of_memory(key: str) -> None:
        np.empty(TOO_MUCH, dtype=np.uint8)

    command.run()
    whole, rows = tree(command.output), command.rows()
    by_file = itemgetter("file")
    other = replace(command, images="others", during=run_out_of_memory, made_by="two")
    for place, source in (("a/y.png", "a/x.png"), ("a/x-overlay.png", "a/y.png"), ("b/x.png", "b/x.png")):
        (command.folder / "others" / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(changed(command, source), command.folder / "others" / place)
    for _ in range(3):
        with pytest.raises(
            RuntimeError,
            match=r"(?s)3 of 3 .*x-overlay.png holds the result of .*images/a/x.png.*y.png holds .*out of memory",
        ):
            other.run()
        assert {**tree(command.output), "sums.csv": b""} == {**whole, "sums.csv": b""}
        assert sorted((row for row in other.rows() if not row["error"]), key=by_file) == rows
        failed = [Path(row["file"]) for row in other.rows() if row["error"]]
        assert failed == [command.folder / "others" / place for place in ("a/x-overlay.png", "a/y.png", "b/x.png")]
    assert command.run() == []
    assert tree(command.output) == whole
    other.overwrite, other.during = True, lambda key: None
    assert other.run() == ["a/x-overlay", "a/y", "b/x"]
    assert replace(other, overwrite=False).run() == []
    with pytest.raises(RuntimeError, match=r"(?s)2 of 4 .*x-overlay.png holds .*others/a/x-ov.*y.png holds .*others"):
        command.run()


def test_an_image_that_has_changed_since_its_folder_was_moved_is_made_again(command):
    command.run()
    (command.folder / "images").rename(command.folder / "moved")
    command.images = "moved"
    shutil.copy(command.folder / "moved" / "b/c/x.png", command.folder / "moved" / "a/x.png")
    fresh = replace(command, out="fresh")
    fresh.run()
    assert command.run() == ["a/x"]
    assert tree(command.output) == tree(fresh.output)


def test_rows_of_images_that_are_not_among_the_inputs_are_counted(command, caplog):
    command.run()
    changed(command, "a/x.png").rename(changed(command, "a/z.png"))
    changed(command, "b/x.png").unlink()
    assert caplog.messages == []
    for _ in range(2):
        command.run()
        assert len(command.rows()) == 5
        (message,) = caplog.messages
        assert message.startswith(f"{command.table} keeps 2 rows of 2 images not among these inputs, such as ")
        caplog.clear()
    for name in ("a/x.png", "b/x.png"):
        (command.output / name).unlink()
    command.run()
    assert caplog.messages == [] and len(command.rows()) == 3


def test_files_of_the_user_are_not_replaced_unless_asked(command, undisturbed):
    command.output.mkdir()
    (command.output / "a").mkdir()
    (command.output / "a" / "y-overlay.png").write_bytes(b"mine")
    with pytest.raises(RuntimeError, match=r"(?s)1 of 4 inputs failed.*y-overlay.png exists already; set overwrite"):
        command.run()
    (command.output / "b" / "x.png").write_bytes(b"edited")
    swap_options(command)
    with pytest.raises(RuntimeError, match=r"(?s)2 of 4 inputs failed.*y-overlay.png exists.*b/x.png exists"):
        command.run()
    assert (command.output / "a" / "y-overlay.png").read_bytes() == b"mine"
    assert (command.output / "b" / "x.png").read_bytes() == b"edited"
    command.overwrite = True
    assert command.run() == ["a/y", "b/x"]
    assert tree(command.output) == undisturbed


def test_an_image_that_fails_is_a_row_and_is_tried_again(command, undisturbed):
    def run_out_of_memory(key: str) -> None:
        if key == "a/x":
            np.empty(TOO_MUCH, dtype=np.uint8)
        if key == "b/x":
            torch.empty(TOO_MUCH, dtype=torch.uint8)

    broken, whole = changed(command, "a/y.png"), changed(command, "a/y.png").read_bytes()
    broken.write_bytes(b"no image")
    with pytest.raises(RuntimeError, match=r"(?s)3 of 4 inputs failed.*x.png: out of memory: .*y.png cannot be dec"):
        replace(command, during=run_out_of_memory).run()
    rows = command.rows()
    assert [row["error"][:13] for row in rows] == ["out of memory", str(broken)[:13], "", "out of memory"]
    assert "cannot be decoded" in rows[1]["error"] and rows[1]["sum"] == rows[1]["image"] == ""
    broken.write_bytes(whole)
    assert command.run() == ["a/x", "a/y", "b/x"]
    assert tree(command.output) == undisturbed
    broken.write_bytes(b"no image")
    with pytest.raises(RuntimeError, match="1 of 4"):
        command.run()
    broken.write_bytes(whole)
    assert command.run() == ["a/y"]  # its earlier output is still known
    assert tree(command.output) == undisturbed


def test_inputs_that_are_missing_count_among_the_failed_ones(command):
    with pytest.raises(RuntimeError, match=r"(?s)1 of 5 inputs failed.*absent: there is no such file"):
        command.run("absent")
    assert len(command.computed) == 4


def test_an_error_that_is_not_of_an_image_ends_the_command(command):
    threads = threading.enumerate()

    def fail(key: str) -> None:
        if key == "a/y":
            raise RuntimeError("an illegal memory access")

    with pytest.raises(RuntimeError, match="^an illegal memory access$"):
        replace(command, during=fail).run()
    assert command.run()[:1] == ["a/y"]
    assert threading.enumerate() == threads


def test_a_full_disk_ends_the_command_which_then_goes_on(command, undisturbed):
    resource = pytest.importorskip("resource")
    pixels = np.random.default_rng(0).integers(0, 256, (200, 200), dtype=np.uint8)  # above 40,000 bytes
    Image.fromarray(pixels).save(changed(command, "a/y.png"))
    fresh = replace(command, out="fresh")
    fresh.run()

    def run() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            command.run()
        except OSError as error:
            os._exit(7 if "y.png could not be written" in str(error) and "File too large" in str(error) else 1)

    assert in_child(run) == 7
    assert not list(command.output.rglob(".writing-*"))
    command.run()
    assert tree(command.output) == tree(fresh.output)


def test_nothing_is_written_outside_of_the_output(command, tmp_path):
    outside = tmp_path / "outside"
    for folder in (outside, command.output):
        folder.mkdir()
    (command.output / "b").symlink_to(outside)
    command.overwrite = True
    with pytest.raises(RuntimeError, match=r"(?s)2 of 4 inputs failed.*out/b.* is a link out of the output"):
        command.run()
    assert list(outside.iterdir()) == []
    (command.output / "test.jsonl").rename(outside / "record")
    (command.output / "test.jsonl").symlink_to(outside / "record")
    with pytest.raises(ValueError, match="test.jsonl is a link"):
        command.run()


def test_an_output_never_replaces_an_input(command):
    command.out, command.overwrite = "images", True
    for name in ("in", "in/in"):
        shutil.copytree(command.folder / "images" / "a", command.folder / "images" / name)
    whole = tree(command.folder / "images" / "in")
    inputs = find_inputs([str(command.folder / "images" / "in")], command.output)
    assert inputs.places == ("in/x.png", "in/y.png", "x.png", "y.png")
    work = Work("test", "", ENDINGS, ENDINGS, stored_images, command.compute, command.encode)
    with pytest.raises(RuntimeError, match=r"(?s)2 of 4 inputs failed.*would replace an input"):
        work_through(inputs, command.output, work, True, progress_bar)
    assert tree(command.folder / "images" / "in") == whole


def test_two_commands_do_not_write_in_one_folder(command):
    command.output.mkdir()
    with FileLock(command.output / ".lock"), pytest.raises(RuntimeError, match="another process is writing in"):
        command.run()


@pytest.mark.parametrize("line", ["[]", '{"image": 3}', '{"image": "a", "rows": [[1]]}', '{"other": "a"}', "{"])
def test_a_record_of_other_content_is_refused_by_its_line(command, line):
    command.run()
    with open(command.output / "test.jsonl", "a") as file:
        file.write(f"{line}\n")
    with pytest.raises(ValueError, match="line 6 of .*test.jsonl is not one that the command writes"):
        command.run()


def test_there_is_room_for_few_images_but_always_for_one():
    room, entered = Room(most=160), []
    sizes = [room.enter(1000)]  # larger than all the room
    threads = [threading.Thread(target=lambda: entered.append(room.enter(1)), daemon=True) for _ in range(40)]
    for thread in threads:
        thread.start()
    assert entered == []
    room.leave(sizes[0])
    while len(entered) < MOST_IMAGES:
        pass
    assert entered == [160 // MOST_IMAGES] * MOST_IMAGES
    room.close()
    for thread in threads:
        thread.join(10)
    assert len(entered) == 40
