"""The page of a run as given to Gradio: its tabs, its queue, its messages, without a browser."""

import os
import sys
from pathlib import Path

import pytest
from diffusers import DDPMScheduler
from PIL import Image

from tests.support.demo_runs import Reports, save_enlarging_run, save_image, save_joint_run
from tests.support.tiny import network
from unet_diffusion import cli
from unet_diffusion.commands.demo.command import serve
from unet_diffusion.commands.demo.jobs import Abilities, load_abilities, segment_image
from unet_diffusion.commands.options.demo import Demo
from unet_diffusion.pipelines import ImageGenerationPipeline, SegmentationPipeline

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # a warning of diffusers about NumPy 2


@pytest.fixture
def joint_run(tmp_path) -> Path:
    return save_joint_run(tmp_path / "joint")


@pytest.fixture
def joint(joint_run) -> Abilities:
    return load_abilities(joint_run, "cpu")


@pytest.fixture
def pages(monkeypatch, tmp_path):
    """The module of the page, which imports Gradio as the command does."""
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    pytest.importorskip("gradio")
    from unet_diffusion.commands.demo import page as demo_page

    return demo_page


def test_each_ability_has_a_tab_and_what_it_lacks_is_hidden(joint, pages, tmp_path):
    def shown(abilities) -> tuple[list[str], dict[str, bool]]:
        blocks = pages.page(tmp_path / "name", abilities, [], tmp_path)
        parts = blocks.get_config_file()["components"]
        tabs = [part["props"]["label"] for part in parts if part["type"] == "tabitem"]
        return tabs, {part["props"].get("elem_id"): part["props"].get("visible") for part in parts}

    tabs, visible = shown(joint)
    assert tabs == ["Generate", "Segment"] and visible["class"] and visible["guidance"]
    tabs, visible = shown(Abilities(generation=ImageGenerationPipeline(network(), DDPMScheduler())))
    assert tabs == ["Generate"] and not visible["class"] and not visible["guidance"]
    enlarging = load_abilities(save_enlarging_run(tmp_path / "enlarging"), "cpu")
    assert shown(enlarging)[0] == ["Super-resolution"]


def test_jobs_wait_for_each_other_and_telemetry_is_off(joint, pages, tmp_path):
    blocks = pages.page(tmp_path, joint, [(tmp_path / "a.png", Image.new("RGB", (4, 4)))], tmp_path)
    assert blocks.analytics_enabled is False
    jobs = [function for function in blocks.fns.values() if function.concurrency_id == "network"]
    assert len(jobs) == 4 and all(job.concurrency_limit == 1 for job in jobs)  # generate; upload; example; objects
    assert all(function.api_visibility == "private" for function in blocks.fns.values())
    options = pages.launch_options()
    assert options["share"] is False and "google" not in "".join(map(str, options["theme"]._stylesheets))


def test_mistakes_become_messages_without_html(pages):
    import gradio

    with pytest.raises(gradio.Error) as shown, pages.errors_as_messages():
        raise ValueError("<img src=x>.png is 'no' image")
    assert shown.value.message == "&lt;img src=x&gt;.png is 'no' image"
    with pytest.raises(gradio.Error, match="Out of memory"), pages.errors_as_messages():
        raise MemoryError("no room.")
    with pytest.raises(AssertionError), pages.errors_as_messages():  # ours, not the visitor's
        raise AssertionError


def test_names_in_the_legend_are_text(joint, pages, tmp_path):
    found = segment_image(joint.segmentation, save_image(tmp_path / "image.png"), tmp_path, Reports())
    table = pages.legend_table(found)
    assert "&lt;b&gt;other&lt;/b&gt;" in table and "<b>" not in table and "rgb(230, 159, 0)" in table


def test_objects_are_counted_in_the_legend_and_found_if_the_run_has_learnt_them(joint, pages, tmp_path):
    path = save_image(tmp_path / "image.png")
    found = segment_image(joint.segmentation, path, tmp_path, Reports(), instances=True)
    table = pages.legend_table(found, with_objects=True)
    one, other = found.objects.counts[1:]
    assert f">{one} object" in table and f">{other} object" in table and "too large" not in table
    without = segment_image(joint.segmentation, path, tmp_path, Reports())
    assert "object" not in pages.legend_table(without)
    assert "too large for objects on this page" in pages.legend_table(without, with_objects=True)

    def ticked(pipe) -> bool:
        parts = pages.page(tmp_path, Abilities(segmentation=pipe), [], tmp_path).get_config_file()["components"]
        return next(part["props"]["value"] for part in parts if part["props"].get("elem_id") == "objects")

    assert not ticked(joint.segmentation)
    assert ticked(SegmentationPipeline(network(num_classes=2, instances=True)))


def test_the_job_of_the_segment_tab_gives_the_files_of_the_objects(joint, pages, tmp_path):
    blocks = pages.page(tmp_path, Abilities(segmentation=joint.segmentation), [], tmp_path)
    job = next(each.fn for each in blocks.fns.values() if each.concurrency_id == "network")
    path = save_image(tmp_path / "image.png")
    *_, mask, labels, table = job(path, 0.5, True)
    assert [button.value["orig_name"] for button in (mask, labels, table)] == [
        *("image-mask.png", "image-objects.tif", "image-objects.csv"),
    ]
    assert labels.visible and table.visible
    *_, labels, table = job(path, 0.5, False)
    assert not labels.visible and not table.visible
    assert job(None, 0.5, True) == pages.gr.skip()  # the box was ticked first


def test_a_proxy_does_not_keep_the_page_from_starting(joint_run, joint, pages, monkeypatch, tmp_path):
    """Gradio opens its own page once, which a proxy elsewhere cannot do."""
    for name in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # where nothing listens
    monkeypatch.setenv("NO_PROXY", "intranet")
    monkeypatch.delenv("no_proxy", raising=False)
    blocks = pages.page(joint_run, joint, [], tmp_path)
    try:
        assert serve(blocks, Demo(joint_run), pages.launch_options()).startswith("http://127.0.0.1:")
    finally:
        blocks.close(verbose=False)
    assert os.environ["NO_PROXY"] == "intranet" and "no_proxy" not in os.environ


def test_without_gradio_the_extra_is_named(joint_run, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gradio", None)  # importing it raises
    monkeypatch.delitem(sys.modules, "unet_diffusion.commands.demo.page", raising=False)
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")  # restored afterwards, as is
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    with pytest.raises(SystemExit, match=r'the page needs Gradio: pip install "unet-diffusion\[demo\]"'):
        cli.run("demo", [str(joint_run), "--device", "cpu"])
