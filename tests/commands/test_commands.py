"""Each command runs for a few steps on a few images, and its output can be read."""

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from unet_diffusion import cli
from unet_diffusion.commands import evaluate_generation
from unet_diffusion.commands.options.evaluate_generation import EvaluateGeneration, RealData
from unet_diffusion.commands.sample import generate, generation_pipeline
from unet_diffusion.data.config import DataConfig
from unet_diffusion.data.record import make_record
from unet_diffusion.data.sets import load_images
from unet_diffusion.evaluation.classifier import ImageClassifier
from unet_diffusion.pipelines import ImageGenerationPipeline, SegmentationPipeline
from unet_diffusion.saved_runs import load_pipeline

SHORT = ["--max-images", "40", "--validation-fraction", "0.1", "--image-size", "8", "--preview-images", "4"]
SHORT += ["--batch-size", "4", "--steps", "2"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("commands")
    network = folder / "network.json"
    network.write_text(json.dumps({"channels": [8, 16], "head_channels": 8}))
    cli.run("train-ddpm", ["--output", str(folder / "run"), "--model", str(network), *SHORT, "--class-conditional"])
    return folder / "run"


def test_sample_writes_images_that_depend_on_seed_and_index_alone(run, tmp_path, capsys):
    arguments = ["--run", str(run), "--steps", "2", "--class-labels", "3", "7"]
    cli.run("sample", [*arguments, "--count", "3", "--output", str(tmp_path / "three")])
    assert capsys.readouterr().out.strip() == str(tmp_path / "three")
    cli.run("sample", [*arguments, "--count", "2", "--max-batch", "1", "--output", str(tmp_path / "two")])
    for name in ("00000.png", "00001.png"):
        three, two = (np.asarray(Image.open(tmp_path / folder / name), dtype=int) for folder in ("three", "two"))
        assert three.shape == (8, 8)
        assert abs(three - two).max() <= 1  # a batch of another size may round differently
    assert (tmp_path / "three" / "grid.png").exists()


def test_sample_writes_nothing_among_the_images_of_training(run, tmp_path):
    (tmp_path / "images").mkdir()
    copy = shutil.copytree(run, tmp_path / "run")
    config = json.loads((copy / "config.json").read_text())
    config["data"]["data"] = str(tmp_path / "images")
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit, match="output is .*/images/new, in the folder .*/images of the data"):
        cli.run("sample", ["--run", str(copy), "--output", str(tmp_path / "images" / "new")])


def test_sample_overwrites_nothing_unless_asked(run, tmp_path):
    (tmp_path / "00000.png").write_bytes(b"mine")
    arguments = ["--run", str(run), "--steps", "1", "--count", "1", "--output", str(tmp_path)]
    with pytest.raises(SystemExit, match="00000.png exists already; set overwrite"):
        cli.run("sample", arguments)
    assert (tmp_path / "00000.png").read_bytes() == b"mine"
    cli.run("sample", [*arguments, "--overwrite"])
    assert Image.open(tmp_path / "00000.png").size == (8, 8)


def test_sample_goes_on_after_a_batch_and_makes_again_what_other_options_made(run, tmp_path, caplog):
    arguments = ["--run", str(run), "--steps", "2", "--count", "5", "--max-batch", "2", "--output", str(tmp_path)]
    cli.run("sample", arguments)
    whole = {path.name: path.read_bytes() for path in tmp_path.glob("*.png")}
    assert len(whole) == 6
    for name in ("00003.png", "00004.png", "grid.png"):  # as a kill in the second batch leaves it
        (tmp_path / name).unlink()
    kept = {path: path.stat().st_ino for path in tmp_path.glob("*.png")}
    cli.run("sample", arguments)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.png")} == whole
    assert all(path.stat().st_ino == number for path, number in kept.items())
    assert caplog.messages == []

    cli.run("sample", [*arguments, "--seed", "1"])
    assert all((tmp_path / name).read_bytes() != content for name, content in whole.items())
    assert caplog.messages == ["5 images were made by another run or with other options, and are made again"]
    (tmp_path / "00001.png").write_bytes(b"mine")
    with pytest.raises(SystemExit, match="00001.png exists already; set overwrite"):
        cli.run("sample", arguments)
    assert (tmp_path / "00001.png").read_bytes() == b"mine"
    cli.run("sample", [*arguments, "--overwrite"])
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.png")} == whole


def test_sample_keeps_batches_of_another_count_and_says_why_others_are_made_again(run, tmp_path, caplog):
    arguments = ["--run", str(run), "--steps", "1", "--max-batch", "2", "--output"]

    def sampled(*options: str) -> set[str]:
        """Returns the images that are made."""
        before = {path.name: path.stat().st_ino for path in tmp_path.glob("out/0*.png")}
        caplog.clear()
        cli.run("sample", [*arguments, str(tmp_path / "out"), *options])
        return {path.name[4] for path in tmp_path.glob("out/0*.png") if before.get(path.name) != path.stat().st_ino}

    def image(name: str) -> bytes:
        return (tmp_path / name).read_bytes()

    assert sampled("--count", "5") == set("01234")
    assert sampled("--count", "7") == set("456")
    assert [message[:38] for message in caplog.messages] == ["1 images were made in other batches, s"]
    cli.run("sample", [*arguments, str(tmp_path / "fresh"), "--count", "7"])
    assert all(image(f"out/0000{i}.png") == image(f"fresh/0000{i}.png") for i in range(7))
    assert sampled("--count", "2") == set() and caplog.messages == []
    assert sampled("--count", "3", "--seed", "1") == set("012")
    assert [message.partition(",")[0] for message in caplog.messages] == [
        "3 images were made by another run or with other options",
        f"4 images of another run or of other options are left in {tmp_path / 'out'}",
    ]


def test_the_grid_of_sample_takes_more_images_than_files_may_be_open(run, tmp_path):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    arguments = ["--run", str(run), "--count", "80", "--max-batch", "80", "--output", str(tmp_path)]
    used = len(os.listdir("/dev/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 40, limits[1]))
    try:
        cli.run("sample", [*arguments, "--steps", "1", "--sampler", "ddim"])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert Image.open(tmp_path / "grid.png").size == (9 * 10 + 2, 9 * 10 + 2)  # 9 x 9 images of 8 pixels, gaps of 2


def test_a_batch_of_sample_that_exceeds_the_memory_is_a_failure(run, tmp_path):
    """Images of 2**24 pixels a side take more than any machine has."""
    copy = shutil.copytree(run, tmp_path / "run")
    config = json.loads((copy / "unet" / "config.json").read_text())
    (copy / "unet" / "config.json").write_text(json.dumps({**config, "sample_size": 2**24}))
    with pytest.raises(SystemExit, match=r"(?s)2 of 2 images failed.*out of memory: .*; set max_batch to less than 2"):
        cli.run("sample", ["--run", str(copy), "--count", "2", "--steps", "1", "--output", str(tmp_path / "out")])
    lines = [json.loads(line) for line in (tmp_path / "out" / "sample.jsonl").read_text().splitlines()]
    assert [(line["image"], line["error"][:13]) for line in lines] == [
        ("00000", "out of memory"),
        ("00001", "out of memory"),
    ]


def test_generated_images_are_compared_with_real_ones_and_with_the_counts(run, tmp_path, capsys):
    arguments = ["--run", str(run), "--steps", "1", "--count", "64", "--data", "mnist-5000", "--image-size", "8"]
    arguments += ["--output", str(tmp_path / "figures.json")]
    cli.run("evaluate-generation", [*arguments, "--max-images", "80", "--validation-fraction", "0"])
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["features"] == "efficientnet-lite0"
    assert figures["figures"]["Frechet distance"]["value"] > 1  # an untrained network draws noise
    assert figures["figures"]["Frechet distance"]["real_count"] == 64
    assert figures["memorisation"]["training_count"] == 80 and figures["memorisation"]["near"] is None
    assert Image.open(tmp_path / "figures.png").size == (8 * (8 + 2) + 2, 4 * (8 + 2) + 2)  # 16 pairs of 8x8
    printed = capsys.readouterr().out
    assert all(name in printed for name in figures["figures"])
    with pytest.raises(SystemExit, match="exists already; set overwrite"):
        cli.run("evaluate-generation", arguments)
    (tmp_path / "figures.json").unlink()
    with pytest.raises(SystemExit, match="figures.png exists already; set overwrite"):
        cli.run("evaluate-generation", arguments)
    with pytest.raises(SystemExit, match=".png is for the pairs beside the figures"):
        cli.run("evaluate-generation", [*arguments, "--output", str(tmp_path / "other.png")])
    with pytest.raises(SystemExit, match="'absent', but must be one of efficientnet-lite0, inception"):
        cli.run("evaluate-generation", [*arguments, "--output", str(tmp_path / "new.json"), "--features", "absent"])


@pytest.mark.slow
def test_copies_of_what_a_run_with_flips_or_crops_learnt_from_are_found(run, tmp_path, capsys):
    output = tmp_path / "run"
    arguments = ["--output", str(output), "--model", str(run.parent / "network.json"), "--steps", "1"]
    arguments += ["--max-images", "100", "--validation-fraction", "0.3", "--preview-images", "1", "--batch-size", "2"]
    cli.run("train-ddpm", [*arguments, "--warmup-steps", "0", "--crop-size", "26", "--flip"])
    options = EvaluateGeneration(run=output, count=64, steps=1, output=tmp_path / "figures.json")
    options.data = RealData(cache_dir=str(tmp_path / "cache"))
    real = evaluate_generation.load_real(options, generation_pipeline(options).unet)
    assert real.mirrored and real.training.random and real.held_out.random and any((tmp_path / "cache").iterdir())
    text = evaluate_generation.evaluate_generation(options, real, [real.training[:64].flip(-1) / 2 + 0.5])
    scores = json.loads((tmp_path / "figures.json").read_text())
    assert scores["memorisation"]["generated"] == pytest.approx(0, abs=1e-6) and scores["memorisation"]["near"] == 1
    assert "only one crop of each is searched" in scores["note"] and scores["note"] in text
    whole = EvaluateGeneration(run=run, count=64, data=RealData("mnist-5000", image_size=8, max_images=80))
    real = evaluate_generation.load_real(whole, generation_pipeline(whole).unet)
    assert not real.mirrored and not real.training.random and real.note == ""


def test_images_that_a_kept_noise_head_learnt_from_do_not_count_as_held_out(run, tmp_path):
    pipe = load_pipeline(ImageGenerationPipeline, run)
    masks = SegmentationPipeline(pipe.unet.to_segmentation(2), pipe.scheduler)
    masks.save_pretrained(tmp_path / "masks")
    (tmp_path / "masks" / "config.json").write_text(json.dumps({"model": str(run), "segmentation": {"learn": "head"}}))
    data = RealData("mnist-5000", image_size=8, max_images=200, validation_fraction=0.5)
    real = [
        evaluate_generation.load_real(EvaluateGeneration(run=each, count=64, data=data), pipe.unet)
        for each in (run, tmp_path / "masks")
    ]
    assert "the run was trained on" in real[0].note and real[1].note == real[0].note
    assert len(real[1].held_out) == len(real[0].held_out) < len(load_images(data).validation)


def test_a_note_tells_that_only_some_classes_were_generated(run):
    data = RealData("mnist-5000", image_size=8, max_images=80)
    for labels, told in (("3", "7", "3"), True), (tuple("0123456789"), False):
        options = EvaluateGeneration(run=run, count=64, data=data, class_labels=labels)
        note = evaluate_generation.load_real(options, generation_pipeline(options).unet).note
        assert ("some classes were generated (3, 7), but the real images are of all classes" in note) == told


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--channels 3", "the real images have 3 channels, but the run generates 1; set channels"),
        ("--image-size 16", "the real images have 16x16 pixels, but the run generates 8x8; set image_size"),
        ("--max-images 66", "real images, but fewer than 64"),
        ("--count 63", "count is 63, but must be at least 64"),
    ],
)
def test_real_images_that_do_not_fit_are_refused_before_any_is_generated(run, tmp_path, monkeypatch, options, message):
    arguments = ["--run", str(run), "--count", "64", "--data", "mnist-5000", "--image-size", "8", "--max-images", "80"]
    arguments += ["--validation-fraction", "0.1", *options.split()]
    monkeypatch.setattr(evaluate_generation, "generated_batches", lambda *_: pytest.fail("generated"))
    with pytest.raises(SystemExit, match=message):
        cli.run("evaluate-generation", [*arguments, "--output", str(tmp_path / "figures.json")])


def test_of_a_streamed_run_it_is_said_that_nobody_knows_what_it_was_trained_on(tmp_path, caplog):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(8):
        Image.fromarray(np.full((8, 8), number, dtype=np.uint8)).save(folder / f"{number}.png")
    stored = DataConfig(data=str(folder), validation_fraction=0.5, cache_dir=str(tmp_path / "cache"))
    images = load_images(stored)
    for streamed, known in ((True, False), (False, True)):
        config = replace(stored, streaming=streamed, image_size=8, **({"validation_fraction": 0.0} if streamed else {}))
        make_record(load_images(config), config.preparation).write(tmp_path)
        held_out, note = evaluate_generation.untrained(images.validation, tmp_path)
        assert held_out is images.validation
        assert (note == "") == known and note in caplog.text
    assert "not known whether it was trained on those that these data hold out (" in caplog.text
    named = DataConfig(data="mnist-5000", streaming=True, image_size=8, validation_data=str(folder))
    sets = load_images(named)
    make_record(sets, named.preparation).write(tmp_path)
    assert evaluate_generation.untrained(sets.validation, tmp_path) == (sets.validation, "")


def test_a_run_whose_held_out_images_are_gone_asks_for_data(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    record = json.loads((copy / "data.json").read_text())
    (copy / "data.json").write_text(json.dumps({**record, "held_out": ["0" * 32]}))
    with pytest.raises(SystemExit, match="none of the images that the run in .* held out is there; give data"):
        cli.run("evaluate-generation", ["--run", str(copy), "--count", "64"])


def test_batches_of_generated_images_are_those_of_one_call(run):
    options = EvaluateGeneration(run=run, count=5, steps=2, max_batch=2, class_labels=("3", "7"), guidance_scale=2.0)
    pipe = generation_pipeline(options)
    batches = [*evaluate_generation.generated_batches(options, pipe)]
    assert [len(batch) for batch in batches] == [2, 2, 1]
    assert torch.equal(torch.cat(batches), generate(options, pipe, "pt"))


def test_images_are_compared_through_a_classifier_of_their_own(run, tmp_path, capsys):
    classifier, figures = tmp_path / "classifier", tmp_path / "figures.json"
    cli.run("train-classifier", ["--output", str(classifier), *SHORT[:6], "--batch-size", "4", "--steps", "2"])
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first.startswith("data: mnist-5000 (train): 40 images of 28x28, 1 channel of uint8")
    assert last == str(classifier)
    arguments = ["--run", str(run), "--steps", "1", "--count", "64", "--data", "mnist-5000", "--image-size", "8"]
    arguments += ["--max-images", "80"]
    arguments += ["--features", str(classifier), "--output", str(figures)]
    cli.run("evaluate-generation", arguments)
    name = json.loads(figures.read_text())["features"]
    assert name.startswith("classifier of mnist-5000 (train), held-out accuracy 0.")
    assert name in capsys.readouterr().out
    arguments += ["--overwrite"]
    saved = json.loads((classifier / "classifier" / "config.json").read_text())
    ImageClassifier.from_config({**saved, "in_channels": 3}).save_pretrained(classifier / "classifier")
    with pytest.raises(SystemExit, match="the images have 1 channel, but classifier of .* takes 3 channels"):
        cli.run("evaluate-generation", arguments)
    with pytest.raises(SystemExit, match="there is no classifier/config.json in it"):
        cli.run("evaluate-generation", [*arguments, "--features", str(run)])


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("train-ddpm", ["--steps", "0"], "steps is 0, but must be an integer of at least 1"),
        ("train-ddpm", ["--model", "absent"], "there is no preset 'absent'; choose one of ddpm-32"),
        ("train-ddpm", ["--data", "/absent/folder"], "absent"),
        ("sample", ["--run", "absent"], "sample: run is absent, but there is no model_index.json"),
        ("sample", ["--count", "0"], "count is 0"),
        ("train-classifier", ["--widths", "1"], "widths is (1,), but must be one or more integers of at least 2"),
        ("evaluate-generation", ["--training-images", "0"], "training_images is 0, but must be at least 1"),
    ],
)
def test_mistakes_end_with_one_sentence(command, arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        cli.run(command, arguments)
    printed = f"{ended.value.code} {capsys.readouterr().err}"
    assert message in " ".join(printed.replace("│", " ").split())  # in a box, its lines are wrapped
    assert not (tmp_path / "runs").exists()


def test_every_command_has_help(capsys):
    for command in cli.COMMANDS:
        with pytest.raises(SystemExit):
            cli.run(command, ["--help"])
        assert f"usage: unet-diffusion {command}" in capsys.readouterr().out


def test_the_program_lists_its_commands(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["unet-diffusion"])
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    printed = capsys.readouterr().out
    assert all(command in printed for command in cli.COMMANDS)
    monkeypatch.setattr(sys, "argv", ["unet-diffusion", "fly"])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    printed = capsys.readouterr().err
    assert "Unrecognized options: fly" in printed
    assert all(command in printed for command in cli.COMMANDS)
