"""The page of a run, made with Gradio (the extra `demo`): one tab for each task that the run was trained for."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any, get_args

import gradio as gr
from PIL import Image

from unet_diffusion.commands.demo.images import Reader
from unet_diffusion.commands.demo.jobs import (
    MAX_COUNT,
    MAX_STEPS,
    NO_CLASS,
    Abilities,
    Segmented,
    can_guide,
    class_choices,
    enlarge_image,
    generate_images,
    learnt_objects,
    segment_image,
)
from unet_diffusion.diffusion.config import SamplerName, best_sampling
from unet_diffusion.images.axes import counted
from unet_diffusion.pipelines.image_generation import ImageGenerationPipeline
from unet_diffusion.pipelines.segmentation import SegmentationPipeline
from unet_diffusion.pipelines.super_resolution import SuperResolutionPipeline
from unet_diffusion.training.model_cards import parameters, size

Examples = list[tuple[Path, Image.Image]]

# One job of a network runs at a time, for all visitors together, and only through the page.
ON_NETWORK: dict[str, Any] = {"concurrency_id": "network", "concurrency_limit": 1, "api_visibility": "private"}
AT_ONCE: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
PROGRESS = gr.Progress()  # as a default value, it tells Gradio that a function reports progress
MAX_WAITING = 32
CLEAN_EVERY, KEPT = 600, 3600  # seconds: uploads and results older than this are deleted
MAX_VISITORS = 100  # visitors whose last mask is kept
MESSAGE_SECONDS = 60
TOO_LARGE = "The image is too large for objects on this page: use unet-diffusion segment --instances."
SHARP = 128  # pixels a side: images up to this size are shown with sharp pixels
CSS = """
.gradio-container { max-width: 1200px !important; width: 100% !important; margin: auto; }
.gradio-container main { width: 100% !important; }
.grid-wrap { overflow-x: hidden !important; }
.grid-container { grid-template-columns: repeat(auto-fill, minmax(96px, 1fr)) !important; }
.grid-container { grid-auto-rows: min-content !important; }
#examples .grid-container { grid-template-columns: repeat(auto-fill, minmax(64px, 1fr)) !important; }
.thumbnail-item { aspect-ratio: 1 !important; height: auto !important; }
.sharp img { image-rendering: pixelated; }
table.legend { border: none !important; }
.legend tr, .legend td { border: none !important; padding: 2px 14px 2px 0; }
.legend .share { text-align: right; font-variant-numeric: tabular-nums; }
.legend .colour { display: inline-block; width: 1em; height: 1em; border: 1px solid #8888; vertical-align: -0.1em; }
"""


def page(run: Path, abilities: Abilities, examples: Examples, folder: Path) -> gr.Blocks:
    """Builds the page, without serving it.

    Results are written to `folder`, inside Gradio's own temporary folder, so that Gradio deletes them later.
    """
    name = run.absolute().name
    cache = (CLEAN_EVERY, KEPT)
    with gr.Blocks(
        title=f"{name} - unet-diffusion", analytics_enabled=False, delete_cache=cache, fill_width=True
    ) as blocks:
        pipe = abilities.generation or abilities.reader
        assert pipe is not None
        gr.Markdown(f"## {escape(name)}\n{describe(pipe)}")
        if abilities.generation is not None:
            with gr.Tab("Generate"):
                _generate_tab(abilities.generation)
        if abilities.segmentation is not None:
            with gr.Tab("Segment"):
                _segment_tab(abilities.segmentation, examples, folder)
        if abilities.super_resolution is not None:
            with gr.Tab("Super-resolution"):
                _enlarge_tab(abilities.super_resolution, examples, folder)
    return blocks.queue(max_size=MAX_WAITING)


def launch_options() -> dict[str, Any]:
    """The look of the page, with parts of Gradio switched off: tunnels, its own fonts, histories, services."""
    theme = gr.themes.Default(primary_hue="blue", font=("system-ui", "sans-serif"), font_mono=("monospace",))
    left_out = dict.fromkeys(("share", "inbrowser", "enable_monitoring", "run_history", "ssr_mode", "pwa"), False)
    capacity = {"state_session_capacity": MAX_VISITORS, "footer_links": []}
    return {"theme": theme, "css": CSS, "mcp_server": False, **left_out, **capacity}


def describe(pipe: ImageGenerationPipeline | Reader) -> str:
    """Returns a sentence on the network and its images."""
    images = f"images of {pipe.channels} channel{'s' if pipe.channels > 1 else ''}, {pipe.pixel_range.dtype}"
    return f"{parameters(pipe.unet)} parameters on {pipe.device}, for {images}, trained at {size(pipe.unet)} pixels."


@contextmanager
def errors_as_messages() -> Iterator[None]:
    """Shows an error about a visitor's input as a message; the page keeps working."""
    shown: dict[str, Any] = {"duration": MESSAGE_SECONDS, "print_exception": False}
    try:
        yield
    except MemoryError as error:
        raise gr.Error(f"Out of memory: {escape(str(error), False)} Use a smaller image.", **shown) from error
    except (ValueError, ImportError, RuntimeError, OSError, FloatingPointError) as error:
        sentence = escape(str(error), quote=False)  # messages are HTML, and may hold the name of an upload
        raise gr.Error(sentence[:1].upper() + sentence[1:], **shown) from error


def _report(progress: gr.Progress, what: str) -> Callable[[int, int], None]:
    """Returns a function that shows finished steps in Gradio's progress display."""
    return lambda done, total: progress((done, total), desc=what, unit="steps")


def _sampling_fields(pipe: ImageGenerationPipeline | SuperResolutionPipeline) -> list[gr.components.Component]:
    """Steps, sampler and seed."""
    largest = min(MAX_STEPS, pipe.scheduler.config.num_train_timesteps)
    config = pipe.scheduler.config
    name, steps = best_sampling(config.get("prediction_type"), pipe.few_steps, config.get("num_train_timesteps"))
    names = [each for each in get_args(SamplerName) if (each == "lcm") == (pipe.few_steps is not None)]
    return [
        gr.Number(min(steps, largest), label="Steps", precision=0, minimum=1, maximum=largest, elem_id="steps"),
        gr.Dropdown(names, value=name, label="Sampler", elem_id="sampler"),
        gr.Number(0, label="Seed", precision=0, elem_id="seed"),
    ]


def _generate_tab(pipe: ImageGenerationPipeline) -> None:
    sides = pipe.unet.config.sample_size
    sharp = max([sides] if isinstance(sides, int) else sides) <= SHARP
    choices = class_choices(pipe)
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            count = gr.Slider(1, MAX_COUNT, 16, step=1, label="Images", elem_id="count")
            sampling = _sampling_fields(pipe)
            choice = gr.Dropdown(choices or [NO_CLASS], label="Class", visible=bool(choices), elem_id="class")
            guidance = gr.Slider(
                1, 10, 1, step=0.1, label="Guidance", info="1 is none", visible=can_guide(pipe), elem_id="guidance"
            )
            button = gr.Button("Generate", variant="primary", elem_id="generate")
        with gr.Column(scale=3):
            gallery = gr.Gallery(
                label="Generated images",
                show_label=False,
                height=560,
                object_fit="contain",
                format="png",
                interactive=False,
                elem_id="generated",
                elem_classes=["sharp"] if sharp else [],
            )

    def job(
        count: int,
        steps: int,
        sampler: SamplerName,
        seed: int,
        choice: str,
        guidance: float,
        progress: gr.Progress = PROGRESS,
    ) -> list[Image.Image]:
        report = _report(progress, "denoising")
        with errors_as_messages():
            return generate_images(pipe, count, steps, sampler, seed, choice, guidance, report)

    button.click(job, [count, *sampling, choice, guidance], gallery, **ON_NETWORK)


def _image_fields(examples: Examples) -> tuple[gr.State, list[Any]]:
    """Fields to upload or pick an image; returns its path and the events that set it."""
    source = gr.State()
    upload = gr.File(label="Image", height=130, elem_id="upload")
    chosen = [upload.upload(Path, upload, source, **AT_ONCE)]
    if examples:
        gallery = gr.Gallery(
            [image for _, image in examples],
            label="Examples",
            show_label=False,
            height=240,
            format="png",
            allow_preview=False,
            interactive=False,
            elem_id="examples",
            buttons=[],
        )

        def pick(event: gr.SelectData) -> Path:
            return examples[event.index][0]

        chosen.append(gallery.select(pick, None, source, **AT_ONCE))
    return source, chosen


def _segment_tab(pipe: SegmentationPipeline, examples: Examples, folder: Path) -> None:
    result = gr.State()
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            source, chosen = _image_fields(examples)
            opacity = gr.Slider(0, 1, 0.5, step=0.05, label="Opacity", elem_id="opacity")
            objects = gr.Checkbox(learnt_objects(pipe), label="Find objects", elem_id="objects")
        with gr.Column(scale=3):
            with gr.Row():
                overlay = _view("**Classes** over the image; the first is transparent", "overlay")
                uncertainty = _view("**Uncertainty**: entropy, black is certain", "uncertainty")
            with gr.Row():
                legend = gr.HTML(elem_id="legend", padding=False)
                with gr.Column(min_width=200):
                    mask = gr.DownloadButton("Mask as PNG", interactive=False, size="md", elem_id="mask")
                    labels = gr.DownloadButton("Objects as TIFF", visible=False, size="md", elem_id="labels")
                    table = gr.DownloadButton("Table as CSV", visible=False, size="md", elem_id="table")

    def job(path: Path | None, opacity: float, objects: bool, progress: gr.Progress = PROGRESS) -> Any:
        if path is None:  # the box was ticked before there was an image
            return gr.skip()
        report = _report(progress, "segmenting")
        with errors_as_messages():
            found = segment_image(pipe, path, folder, report, objects)
            files = (found.objects.label_file, found.objects.table_file) if found.objects else (None, None)
            buttons = [gr.DownloadButton(value=file, visible=file is not None) for file in files]
            button = gr.DownloadButton(value=found.file, interactive=True)
            shown = found.overlay(opacity), found.uncertainty, legend_table(found, objects)
            return found, *shown, button, *buttons

    def blend(found: Segmented | None, opacity: float) -> Image.Image | None:
        return None if found is None else found.overlay(opacity)

    for start in (objects.input, *(event.success for event in chosen)):
        results = [result, overlay, uncertainty, legend, mask, labels, table]
        start(job, [source, opacity, objects], results, **ON_NETWORK)
    opacity.input(blend, [result, opacity], overlay, trigger_mode="always_last", **AT_ONCE)


def _enlarge_tab(pipe: SuperResolutionPipeline, examples: Examples, folder: Path) -> None:
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            source, chosen = _image_fields(examples)
            sampling = _sampling_fields(pipe)
            button = gr.Button("Enlarge again", variant="primary", elem_id="enlarge")
        with gr.Column(scale=3):
            with gr.Row():
                large = _view(f"**{pipe.scale} times larger** a side, by the network", "large")
                bicubic = _view("**Bicubic**, for comparison", "bicubic")
            download = gr.DownloadButton("Large image as a file", interactive=False, size="md", elem_id="large-file")

    def job(path: Path | None, steps: int, sampler: SamplerName, seed: int, progress: gr.Progress = PROGRESS) -> tuple:
        report = _report(progress, "denoising")
        with errors_as_messages():
            if path is None:
                raise ValueError("there is no image yet; upload one.")
            found = enlarge_image(pipe, path, steps, sampler, seed, folder, report)
            return found.large, found.bicubic, gr.DownloadButton(value=found.file, interactive=True)

    for start in (button.click, *(event.success for event in chosen)):
        start(job, [source, *sampling], [large, bicubic, download], **ON_NETWORK)


def _view(caption: str, name: str) -> gr.Image:
    """The place of a result, below its caption."""
    with gr.Column(min_width=260):
        gr.Markdown(caption)
        return gr.Image(show_label=False, format="png", interactive=False, elem_id=name, buttons=["fullscreen"])


def legend_table(found: Segmented, with_objects: bool = False) -> str:
    """Colour, name and share of each class, and the number of its objects if they were asked for, as HTML."""
    counts = [""] * len(found.legend)
    if found.objects is not None:  # the background has none
        counts[1:] = [counted(count, "object") for count in found.objects.counts[1:]]
    rows = [
        f'<tr><td><span class="colour" style="background: rgb{shade}"></span></td><td>{escape(name)}</td>'
        f'<td class="share">{share:.1%}</td><td class="share">{count}</td></tr>'
        for (name, shade, share), count in zip(found.legend, counts)
    ]
    table = f'<table class="legend">{"".join(rows)}</table>'
    return table if found.objects or not with_objects else f"{table}<p>{TOO_LARGE}</p>"
