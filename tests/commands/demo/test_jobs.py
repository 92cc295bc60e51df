"""The jobs of a run's page: their results and their errors."""

import io
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image

from tests.support.demo_runs import NAMES, Reports, save_enlarging_run, save_image, save_joint_run
from tests.support.tiny import network
from unet_diffusion import cli
from unet_diffusion.commands.demo.images import LARGEST_SHOWN, SMALLEST_SHOWN, find_examples, fitted, heat, read_upload
from unet_diffusion.commands.demo.jobs import (
    EVERY_CLASS,
    MAX_COUNT,
    MAX_STEPS,
    NO_CLASS,
    can_guide,
    class_choices,
    enlarge_image,
    generate_images,
    learnt_objects,
    load_abilities,
    segment_image,
)
from unet_diffusion.commands.options.demo import Demo
from unet_diffusion.diffusion.low_resolution import enlarged
from unet_diffusion.images.palette import PALETTE, overlay
from unet_diffusion.images.pixel_range import PixelRange
from unet_diffusion.pipelines import ImageGenerationPipeline, SegmentationPipeline, SuperResolutionPipeline

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # a warning of diffusers about NumPy 2
PIXELS_12_BIT = PixelRange((0.0,), (4095.0,), "uint16")


@pytest.fixture(scope="module")
def joint_run(tmp_path_factory) -> Path:
    return save_joint_run(tmp_path_factory.mktemp("demo") / "joint")


@pytest.fixture(scope="module")
def joint(joint_run):
    return load_abilities(joint_run, "cpu")


@pytest.fixture(scope="module")
def enlarging(tmp_path_factory) -> SuperResolutionPipeline:
    run = save_enlarging_run(tmp_path_factory.mktemp("demo") / "enlarging")
    return load_abilities(run, "cpu").super_resolution


# --- what a run can do


def test_a_run_has_the_abilities_that_it_was_trained_for(joint, enlarging, tmp_path):
    assert joint.generation is not None and joint.segmentation is not None and joint.super_resolution is None
    assert joint.reader is joint.segmentation
    ImageGenerationPipeline(network(), DDPMScheduler()).save_pretrained(tmp_path / "generates")
    generates = load_abilities(tmp_path / "generates", "cpu")
    assert generates.generation is not None and generates.reader is None
    SegmentationPipeline(network(num_classes=2), DDPMScheduler()).save_pretrained(tmp_path / "segments")
    segments = load_abilities(tmp_path / "segments", "cpu")  # its noise head was not trained with the changed trunk
    assert segments.segmentation is not None and segments.generation is None
    assert enlarging.scale == 2


def test_a_folder_without_a_run_gives_one_sentence(tmp_path):
    with pytest.raises(SystemExit) as ended:
        cli.run("demo", [str(tmp_path)])
    sentence = f"unet-diffusion demo: run is {tmp_path}, but there is no model_index.json; give the folder of a"
    assert str(ended.value).startswith(sentence)


@pytest.mark.parametrize("port", [0, 70000])
def test_wrong_ports_are_refused(port):
    with pytest.raises(ValueError, match=f"port is {port}, but must be from 1 to 65535"):
        Demo(Path("run"), port=port)


def test_wrong_devices_are_named(joint_run):
    with pytest.raises(ValueError, match="device is 'tpu', but only cpu"):
        load_abilities(joint_run, "tpu")


# --- generate


def test_a_run_in_the_working_folder_does_not_matter(joint, tmp_path, monkeypatch):
    """`runs/ddpm` is the default run of the commands."""
    (tmp_path / "runs/ddpm/scheduler").mkdir(parents=True)
    (tmp_path / "runs/ddpm/scheduler/scheduler_config.json").write_text("{")
    monkeypatch.chdir(tmp_path)
    assert len(generate_images(joint.generation, 1, 3, "ddim", 0, EVERY_CLASS, 1.0, Reports())) == 1


def test_images_are_those_of_the_command(joint, joint_run, tmp_path):
    cli.run("sample", ["--run", str(joint_run), "--output", str(tmp_path / "samples"), "--count", "3", "--steps", "2",
                       "--seed", "5", "--class-labels", "left", "right", "--max-batch", "16"])  # fmt: skip
    reports = Reports()
    found = generate_images(joint.generation, 3, 2, "sde-dpm-solver++", 5, EVERY_CLASS, 1.0, reports)
    for i, image in enumerate(found):
        assert np.array_equal(np.asarray(image), np.asarray(Image.open(tmp_path / "samples" / f"{i:05d}.png")))
    assert reports == [(1, 2), (2, 2)]


def test_a_visitor_leaves_the_pipeline_as_it_was(joint):
    scheduler, bar = joint.generation.scheduler, joint.generation.progress_bar
    first = generate_images(joint.generation, 1, 2, "ddim", 0, NO_CLASS, 1.0, Reports())
    generate_images(joint.generation, 1, 3, "heun", 1, "1", 2.0, Reports())
    assert joint.generation.scheduler is scheduler and joint.generation.progress_bar == bar
    assert joint.generation.config["scheduler"] == ("diffusers", "DDPMScheduler")
    again = generate_images(joint.generation, 1, 2, "ddim", 0, NO_CLASS, 1.0, Reports())
    assert np.array_equal(np.asarray(first[0]), np.asarray(again[0]))


def test_simultaneous_visitors_get_what_each_gets_alone(joint):
    wishes = [("ddim", 0), ("heun", 1), ("dpm-solver++", 2), ("ddpm", 3)]

    def wished(wish: tuple[str, int]) -> np.ndarray:
        name, seed = wish
        (image,) = generate_images(joint.generation, 1, 8, name, seed, NO_CLASS, 1.0, Reports())
        return np.asarray(image)

    alone = [wished(wish) for wish in wishes]
    with ThreadPoolExecutor(len(wishes)) as visitors:
        together = list(visitors.map(wished, wishes))
    assert all(np.array_equal(*pair) for pair in zip(alone, together))


def test_classes_are_offered_by_name_and_guidance_where_it_was_trained(joint):
    choices = [("each in turn", EVERY_CLASS), ("without a class", NO_CLASS), ("left", "0"), ("right", "1")]
    assert class_choices(joint.generation) == choices and can_guide(joint.generation)
    dropless = ImageGenerationPipeline(network(num_class_embeds=2), DDPMScheduler())
    assert class_choices(dropless) == [("each in turn", EVERY_CLASS), ("class 0", "0"), ("class 1", "1")]
    assert not can_guide(dropless)
    plain = ImageGenerationPipeline(network(), DDPMScheduler())
    assert class_choices(plain) == [] and not can_guide(plain)
    assert len(generate_images(plain, 2, 1, "ddim", 0, NO_CLASS, 1.0, Reports())) == 2


@pytest.mark.parametrize("channels", [2, 5])
def test_images_of_any_channels_and_depth_can_be_looked_at(channels):
    unet = network(in_channels=channels, out_channels=channels)
    pipe = ImageGenerationPipeline(unet, DDPMScheduler(), pixel_range=PIXELS_12_BIT.to_dict())
    (image,) = generate_images(pipe, 1, 1, "ddim", 0, NO_CLASS, 1.0, Reports())
    assert (image.mode, image.size) == ("L" if channels == 2 else "RGB", (8, 8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": MAX_COUNT + 1}, "count is 65, but must be an integer from 1 to 64 on this page"),
        ({"count": 0}, "count is 0"),
        ({"steps": MAX_STEPS + 1}, "steps is 1001, but must be an integer from 1 to 1000 on this page"),
        ({"steps": None}, "steps is None"),
        ({"seed": None}, "seed is None, but must be an integer"),
        ({"sampler_name": "absent"}, "there is no sampler 'absent'"),
        ({"choice": "7"}, "class_labels is '7', but the classes are left, right"),
        ({"choice": NO_CLASS, "guidance_scale": 2.0}, "guidance_scale is 2.0, but there is no class to guide to"),
    ],
)
def test_wrong_options_of_generation_are_named(joint, change, message):
    options = {"count": 1, "steps": 1, "sampler_name": "ddim", "seed": 0, "choice": "0", "guidance_scale": 1.0}
    with pytest.raises(ValueError, match=message):
        generate_images(joint.generation, **{**options, **change}, report=Reports())


# --- segment


def test_a_mask_is_that_of_the_pipeline_and_its_file_holds_the_classes(joint, tmp_path):
    path = save_image(tmp_path / "image.png")
    found = segment_image(joint.segmentation, path, tmp_path, Reports())
    expected = joint.segmentation(path)
    labels = np.asarray(expected.masks[0])
    with Image.open(found.file) as mask:
        assert (found.file.name, mask.format, mask.mode) == ("image-mask.png", "PNG", "P")
        assert np.array_equal(np.asarray(mask), labels)
    assert [name for name, _, _ in found.legend] == NAMES
    assert [shade for _, shade, _ in found.legend] == PALETTE[:3]
    shares = np.bincount(labels.ravel(), minlength=3) / labels.size
    assert [share for _, _, share in found.legend] == pytest.approx(shares)
    factor = SMALLEST_SHOWN // 12
    assert np.array_equal(found.mask[::factor, ::factor], labels)
    heated = np.asarray(found.uncertainty)[::factor, ::factor]
    assert np.array_equal(heated, np.asarray(heat(expected.uncertainty[0])))


def test_opacity_is_that_of_the_pipeline_and_does_not_run_the_network(joint, tmp_path, monkeypatch):
    path = save_image(tmp_path / "image.png")
    found = segment_image(joint.segmentation, path, tmp_path, Reports())
    expected = [joint.segmentation.overlay(path, Image.open(found.file), opacity) for opacity in (0, 0.3, 1)]
    monkeypatch.setattr(joint.segmentation.unet, "forward", None)  # so that a call would fail
    for opacity, image in zip((0, 0.3, 1), expected):
        assert np.array_equal(np.asarray(found.overlay(opacity)), np.asarray(fitted(image)))
    with pytest.raises(ValueError, match="opacity is 2, but must be from 0 to 1"):
        found.overlay(2)


def test_tiles_are_reported(joint, tmp_path, monkeypatch):
    monkeypatch.setattr("unet_diffusion.network.tiling.WHOLE", 0)
    monkeypatch.setattr("unet_diffusion.network.tiling.MEMORY", 2**20)
    reports = Reports()
    segment_image(joint.segmentation, save_image(tmp_path / "large.png", 300, 200), tmp_path, reports)
    assert len(reports) > 1 and reports == [(done, len(reports)) for done in range(1, len(reports) + 1)]


def test_an_image_of_too_many_probabilities_has_no_uncertainty(joint, tmp_path, monkeypatch):
    monkeypatch.setattr("unet_diffusion.commands.demo.jobs.MAX_PROBABILITIES", 12 * 10 * 3 - 1)
    path = save_image(tmp_path / "image.png")
    assert segment_image(joint.segmentation, path, tmp_path, Reports()).uncertainty is None


def test_objects_are_those_of_the_command_with_their_outlines_and_counts(joint, joint_run, tmp_path):
    path = save_image(tmp_path / "image.png", 20, 30)
    cli.run(
        "segment", ["--run", str(joint_run), "--inputs", str(path), "--output", str(tmp_path / "out"), "--instances"]
    )
    found = segment_image(joint.segmentation, path, tmp_path, Reports(), instances=True)
    assert found.objects is not None
    for file in (found.objects.label_file, found.objects.table_file):
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()
    labels = np.asarray(Image.open(found.objects.label_file))
    factor = SMALLEST_SHOWN // 30
    assert labels.max() > 1 and np.array_equal(found.objects.labels[::factor, ::factor], labels)
    classes = pandas.read_csv(found.objects.table_file)["class"]
    assert found.objects.counts == [0, (classes == 1).sum(), (classes == 2).sum()]
    shown = overlay(found.image, found.mask, 0.5, None, found.objects.labels)
    assert np.array_equal(np.asarray(found.overlay(0.5)), np.asarray(shown))
    assert not np.array_equal(shown, segment_image(joint.segmentation, path, tmp_path, Reports()).overlay(0.5))


def test_micrometres_are_in_the_table_if_the_upload_says_its_pixel_size(joint, tmp_path):
    tifffile = pytest.importorskip("tifffile")
    pixels = np.asarray(Image.open(save_image(tmp_path / "image.png", 20, 30)))
    tifffile.imwrite(tmp_path / "image.tif", pixels, resolution=(2, 2), resolutionunit="MICROMETER")
    found = segment_image(joint.segmentation, tmp_path / "image.tif", tmp_path, Reports(), instances=True)
    table = pandas.read_csv(found.objects.table_file)
    assert table["area_um2"].tolist() == (table["area"] / 4).tolist()


def test_an_image_without_objects_and_one_that_is_too_large_for_them(joint, tmp_path, monkeypatch):
    path = save_image(tmp_path / "image.png")
    monkeypatch.setattr("unet_diffusion.commands.demo.jobs.MAX_PROBABILITIES", 12 * 10 * 3 - 1)
    assert segment_image(joint.segmentation, path, tmp_path, Reports(), instances=True).objects is None
    monkeypatch.undo()
    head = joint.segmentation.unet.segmentation_head
    before = head.bias.data.clone()
    head.bias.data[0] = 1e4  # background everywhere
    try:
        found = segment_image(joint.segmentation, path, tmp_path, Reports(), instances=True)
    finally:
        head.bias.data.copy_(before)
    assert found.objects.counts == [0, 0, 0] and len(pandas.read_csv(found.objects.table_file)) == 0


def test_the_networks_that_have_learnt_objects_are_known(joint):
    assert not learnt_objects(joint.segmentation)
    assert learnt_objects(SegmentationPipeline(network(num_classes=2, instances=True)))


def test_16_bit_files_are_read_as_they_are(tmp_path):
    pipe = SegmentationPipeline(network(num_classes=2), pixel_range=PIXELS_12_BIT.to_dict())
    pixels = np.random.default_rng(0).integers(0, 4096, (9, 8), dtype=np.uint16)
    Image.fromarray(pixels).save(tmp_path / "deep.png")
    np.save(tmp_path / "deep.npy", pixels)
    expected = np.asarray(pipe(pixels).masks[0])
    for name in ("deep.png", "deep.npy"):
        found = segment_image(pipe, tmp_path / name, tmp_path, Reports())
        assert np.array_equal(np.asarray(Image.open(found.file)), expected)
    eight_bit = save_image(tmp_path / "eight.png")
    with pytest.raises(ValueError, match="holds uint8, but the network was trained on uint16"):
        segment_image(pipe, eight_bit, tmp_path, Reports())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("notes.txt", b"no image", "^notes.txt cannot be decoded: it is not an image"),
        ("empty.png", b"", "^empty.png is empty"),
        ("objects.npy", None, "^objects.npy cannot be decoded: it holds Python objects"),
        ("deleted.png", ..., "^deleted.png is no longer here, since uploads are kept for an hour; give it again"),
    ],
)
def test_wrong_files_are_named_without_the_folders_of_the_server(name, content, message, tmp_path):
    if content is None:
        file = io.BytesIO()
        np.save(file, np.array([{}], dtype=object), allow_pickle=True)
        content = file.getvalue()
    if content is not ...:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_upload(tmp_path / name, SegmentationPipeline(network(num_classes=2)))


def test_uploads_are_read_as_the_images_of_the_run_were(tmp_path):
    SegmentationPipeline(network(in_channels=3, num_classes=2)).save_pretrained(tmp_path / "run")
    pipe = load_abilities(tmp_path / "run", "cpu").segmentation
    pixels = np.random.default_rng(0).integers(0, 256, (3, 9, 8), dtype=np.uint8)
    expected = np.asarray(pipe(torch.from_numpy(pixels)).masks[0])
    np.save(tmp_path / "first.npy", pixels)
    alpha = np.full((9, 8, 1), 255, np.uint8)
    Image.fromarray(np.concatenate([pixels.transpose(1, 2, 0), alpha], axis=2)).save(tmp_path / "alpha.png")
    for name, stated in {"first.npy": {"axes": "CHW"}, "alpha.png": {"channels": 3}}.items():
        (tmp_path / "run" / "config.json").write_text(json.dumps({"data": stated}))
        own = load_abilities(tmp_path / "run", "cpu").segmentation
        found = segment_image(own, tmp_path / name, tmp_path, Reports())
        assert np.array_equal(np.asarray(Image.open(found.file)), expected)


# --- enlarge


def test_a_large_image_is_that_of_the_command(enlarging, tmp_path):
    run, path = save_enlarging_run(tmp_path / "run"), save_image(tmp_path / "small.png", channels=3)
    cli.run("upscale", ["--run", str(run), "--inputs", str(path), "--steps", "2", "--output", str(tmp_path / "out")])
    reports = Reports()
    found = enlarge_image(enlarging, path, 2, "sde-dpm-solver++", 0, tmp_path, reports)
    assert found.file.name == "small-large.png"
    large = np.asarray(Image.open(found.file))
    assert large.shape == (24, 20, 3)
    assert np.array_equal(large, np.asarray(Image.open(tmp_path / "out" / "small.png")))
    assert np.array_equal(np.asarray(found.large), np.asarray(fitted(Image.fromarray(large))))
    assert reports == [(1, 2), (2, 2)]
    pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None]
    bicubic = (enlarged(pixels, 2, PixelRange.full("uint8"))[0].permute(1, 2, 0).numpy() / 2 + 0.5) * 255
    factor = SMALLEST_SHOWN // 24
    assert abs(np.asarray(found.bicubic)[::factor, ::factor] - bicubic).max() <= 0.51


def test_images_that_png_cannot_hold_become_arrays(tmp_path):
    pixel_range = PixelRange((0.0,), (1.0,), "float32")
    run = save_enlarging_run(tmp_path / "run", channels=1, pixel_range=pixel_range.to_dict())
    np.save(tmp_path / "small.npy", np.random.default_rng(0).random((5, 4), dtype=np.float32))
    found = enlarge_image(
        load_abilities(run, "cpu").super_resolution, tmp_path / "small.npy", 1, "ddim", 0, tmp_path, Reports()
    )
    large = np.load(found.file)
    assert large.shape == (10, 8, 1) and large.dtype == np.float32
    assert found.large.mode == "RGB"


def test_wrong_images_to_enlarge_are_named(enlarging, tmp_path, monkeypatch):
    grey = save_image(tmp_path / "grey.png")
    with pytest.raises(ValueError, match="the image has 1 channel, but the network takes 3"):
        enlarge_image(enlarging, grey, 1, "ddim", 0, tmp_path, Reports())
    path = save_image(tmp_path / "colour.png", channels=3)
    with pytest.raises(ValueError, match="steps is 0"):
        enlarge_image(enlarging, path, 0, "ddim", 0, tmp_path, Reports())
    monkeypatch.setattr("unet_diffusion.commands.demo.jobs.MAX_ENLARGED", 479)
    with pytest.raises(ValueError, match="would have 20x24 pixels, but the page makes at most 479"):
        enlarge_image(enlarging, path, 1, "ddim", 0, tmp_path, Reports())


# --- images on the page


def test_images_fit_the_page():
    assert fitted(Image.new("RGB", (4 * LARGEST_SHOWN, LARGEST_SHOWN))).size == (LARGEST_SHOWN, LARGEST_SHOWN // 4)
    assert fitted(Image.new("P", (100_000, 1))).size == (LARGEST_SHOWN, 1)
    assert fitted(Image.new("RGB", (SMALLEST_SHOWN + 1, 5))).size == (SMALLEST_SHOWN + 1, 5)
    assert fitted(Image.new("RGB", (28, 14))).size == (28 * 13, 14 * 13)  # 384 // 28 is 13


def test_examples_are_checked_before_the_page_is_there(joint, tmp_path):
    with pytest.raises(ValueError, match="there is no image in it; give a folder of images"):
        find_examples(tmp_path, joint.segmentation)
    path = save_image(tmp_path / "a.png")
    ((found, thumbnail),) = find_examples(tmp_path, joint.segmentation)
    assert found == path and thumbnail.mode == "RGB" and max(thumbnail.size) <= 128
    with pytest.raises(ValueError, match="examples are .*, but the run only generates"):
        find_examples(tmp_path, None)
    save_image(tmp_path / "b.png", channels=3)
    with pytest.raises(ValueError, match="b.png does not fit the run: the image has 3 channels"):
        find_examples(tmp_path, joint.segmentation)
