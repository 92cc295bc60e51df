"""Runs as graphs of ONNX and of `torch.export`, and as one file of safetensors."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.support.tiny import network
from unet_diffusion import UNet
from unet_diffusion.adapters import PixelClassifier, UNet2DAdapter
from unet_diffusion.cli import run
from unet_diffusion.commands.export.command import export
from unet_diffusion.commands.export.graphs import compare, fields_of
from unet_diffusion.commands.export.head_function import HeadFunction, Sizes
from unet_diffusion.commands.export.single_file import load_single_file
from unet_diffusion.commands.options.export import Export
from unet_diffusion.pipelines import ImageGenerationPipeline, SegmentationPipeline, SuperResolutionPipeline

PIXEL_RANGE = {"low": [0.0], "high": [4095.0], "dtype": "uint16"}
LIGHT = {"channels": (4, 8), "attention": (False, False)}  # the network that compiles fastest


def stock(**config) -> UNet2DAdapter:
    blocks = {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "attention_head_dim": 8,
        "norm_num_groups": 4,
    }
    return UNet2DAdapter.from_stock(UNet2DModel(16, 1, 1, **blocks, **config)).to_segmentation(3).eval()


def save(unet, folder: Path, kind=SegmentationPipeline, **details) -> Path:
    kind(unet, scheduler=DDPMScheduler(), **details).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def masks(tmp_path_factory) -> Path:
    """The run of a network for masks alone."""
    torch.manual_seed(0)
    details = {"class_names": ["ground", "cell", "edge"], "palette": [[0, 0, 0], [255, 0, 0], [0, 0, 255]]}
    unet = network(**LIGHT, out_channels=None, num_classes=3, time_embedding=None)
    return save(unet, tmp_path_factory.mktemp("masks") / "run", pixel_range=PIXEL_RANGE, **details)


@pytest.fixture(scope="module")
def classes(tmp_path_factory) -> Path:
    """The run of a noise predictor with classes."""
    torch.manual_seed(0)
    unet = network(**LIGHT, num_class_embeds=4, label_dropout=0.1)
    return save(unet, tmp_path_factory.mktemp("classes") / "run", ImageGenerationPipeline, label_names=list("abcd"))


def onnx_session(path: Path):
    return pytest.importorskip("onnxruntime").InferenceSession(str(path), providers=["CPUExecutionProvider"])


# --- graphs ---


@pytest.mark.slow
def test_the_graph_of_onnx_gives_the_logits_of_the_run_at_other_sizes_and_says_what_it_takes(masks, tmp_path, capsys):
    run("export", ["--format", "onnx", str(masks), str(tmp_path / "graphs")])
    path, check = capsys.readouterr().out.strip().split("\n")
    assert path == str(tmp_path / "graphs")
    assert check.startswith("segmentation.onnx: at 7 batches and sizes, 1x1x4, 2x5x1, ")
    assert " of the largest value" in check
    assert [file.name for file in (tmp_path / "graphs").iterdir()] == ["segmentation.onnx"]

    session = onnx_session(tmp_path / "graphs" / "segmentation.onnx")
    assert [(each.name, each.shape) for each in session.get_inputs()] == [("image", ["batch", 1, "height", "width"])]
    assert [each.name for each in session.get_outputs()] == ["logits"]
    unet = UNet.from_pretrained(masks / "unet")
    for size in ((1, 1, 17, 30), (5, 1, 12, 7)):
        image = torch.randn(size).clamp(-1, 1)
        with torch.no_grad():
            expected = unet(image, head="segmentation").logits.numpy()
        (found,) = session.run(None, {"image": image.numpy()})
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max(), strict=True)

    fields = session.get_modelmeta().custom_metadata_map
    assert (fields["format"], fields["head"], fields["output"]) == ("onnx", "segmentation", "logits")
    assert json.loads(fields["value_range"]) == [-1, 1]
    assert json.loads(fields["pixel_range"]) == PIXEL_RANGE
    assert json.loads(fields["class_names"]) == ["ground", "cell", "edge"]
    assert json.loads(fields["palette"])[1] == [255, 0, 0]
    assert (fields["num_classes"], fields["smallest_side"], fields["sides_are_multiples_of"]) == ("3", "1", "1")
    assert int(fields["opset"]) >= 18
    content = (tmp_path / "graphs" / "segmentation.onnx").read_bytes()
    assert str(Path(__file__).parents[3]).encode() not in content  # no folder of this machine is named


@pytest.mark.slow
def test_a_program_of_torch_gives_the_noise_of_the_run_for_timesteps_and_classes(classes, tmp_path):
    done = export(Export(classes, tmp_path / "graphs", "torch-export", "noise"))
    assert done.path == tmp_path / "graphs" and len(done.checks) == 1
    extra = {"metadata.json": ""}
    program = torch.export.load(tmp_path / "graphs" / "noise.pt2", extra_files=extra).module()
    unet = UNet.from_pretrained(classes / "unet")
    for size in ((1, 1, 17, 30), (5, 1, 12, 7)):
        inputs = torch.randn(size), 1000 * torch.rand(size[0]), torch.arange(size[0])  # 4 is the null class
        with torch.no_grad():
            torch.testing.assert_close(program(*inputs), unet(*inputs, head="noise").sample)

    fields = json.loads(extra["metadata.json"])
    assert (fields["head"], fields["output"]) == ("noise", "prediction")
    assert json.loads(fields["inputs"]) == ["sample", "timestep", "class_labels"]
    assert json.loads(fields["label_names"]) == list("abcd")
    assert (fields["num_class_embeds"], fields["null_class"], fields["smallest_side"]) == ("4", "4", "3")
    assert json.loads(fields["scheduler"])["prediction_type"] == "epsilon"
    assert json.loads(fields["pixel_range"])["dtype"] == "uint8"


VARIANTS = {
    "both heads, with attention at both resolutions": lambda: network(
        num_classes=3, channels=(8, 16), attention=(True, True)
    ),
    "strided and nearest, continuous noise levels": lambda: network(
        num_classes=3, downsample="conv", upsample="nearest", time_embedding="fourier"
    ),
    "classes": lambda: network(num_classes=3, num_class_embeds=4, label_dropout=0.1),
    "plain with batch norm": lambda: network(**LIGHT, num_classes=3, block="plain", norm="batch"),
    "unpadded, with a noise head": lambda: network(**LIGHT, num_classes=3, padding="valid"),
    "2015": lambda: UNet.from_preset(
        "ronneberger-2015", sample_size=196, in_channels=1, num_classes=2, channels=(4, 4, 4, 4, 8)
    ).eval(),
    "stock": stock,
    "stock with classes": lambda: stock(num_class_embeds=4),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("form", ["onnx", "torch-export"])
def test_every_kind_of_network_becomes_graphs_that_agree_with_it(form, name, tmp_path):
    """The command itself compares them, at even, odd and oblong sizes and several batches."""
    unet = VARIANTS[name]()
    done = export(Export(save(unet, tmp_path / "run"), tmp_path / "graphs", form))
    heads = {"segmentation"} if unet.noise_head is None else {"segmentation", "noise"}
    assert {file.stem for file in (tmp_path / "graphs").iterdir()} == heads
    assert len(done.checks) == len(heads)


@pytest.mark.slow
def test_programs_run_where_the_package_is_not_installed(classes, tmp_path):
    export(Export(classes, tmp_path / "graphs", "torch-export"))
    code = (
        "import sys; sys.modules['unet_diffusion'] = sys.modules['diffusers'] = None\n"
        "import torch\n"
        f"program = torch.export.load({str(tmp_path / 'graphs' / 'noise.pt2')!r}).module()\n"
        "print(tuple(program(torch.zeros(2, 1, 9, 11), torch.zeros(2), torch.tensor([0, 3])).shape))\n"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "(2, 1, 9, 11)", done.stderr


def test_a_graph_is_compared_at_the_smallest_size_at_even_and_odd_ones_and_at_that_of_the_training():
    for unet, smallest, multiple in (
        (network(sample_size=16), 1, 1),
        (network(**LIGHT, padding="valid", sample_size=16), 20, 1),
        (stock(), 2, 2),
        (UNet.from_preset("ronneberger-2015", num_classes=2, channels=(2, 2, 2, 2, 2), sample_size=[572, 300]), 188, 1),
    ):
        sizes = Sizes.of_network(unet)
        assert (sizes.smallest, sizes.multiple, sizes.largest_batch) == (smallest, multiple, None)
        tried = sizes.tried(unet)
        assert min(height for _, height, _ in tried) == min(width for _, _, width in tried) == smallest
        parities = {(height // multiple % 2, width // multiple % 2) for _, height, width in tried}
        assert parities == {(0, 0), (0, 1), (1, 0), (1, 1)}
        assert {batch for batch, _, _ in tried} == {1, 2, 3, 4}
        trained = {16: (16, 16), 572: (572, 300)}[np.ravel(unet.config.sample_size)[0]]
        assert ((1, *trained) in tried) == (min(trained) >= smallest)
    assert Sizes.of_program(stock()) == Sizes(4, 2, 63)


def test_a_graph_that_does_not_compute_what_the_network_computes_is_refused():
    function = HeadFunction(network(**LIGHT, num_classes=3, time_embedding=None), "segmentation")
    sizes = [(2, 5, 6)]
    assert "at most 0.0e+00" in compare(function, function, sizes, "same")
    # a millionth of the largest value is allowed, a thousandth is not
    almost, other = (lambda x, f=f: function(x) + f * function(x).abs().max() for f in (1e-6, 1e-3))
    assert compare(function, almost, sizes, "almost").endswith("1.0e-06 of the largest value")

    def failing(image):
        raise KeyError("no such kernel")

    for graph, message in (
        (other, "a batch of 2 of 5x6 pixels, 1.0e-03 of the largest value, but at most 1e-04 is allowed, so nothing"),
        (lambda x: function(x) * torch.nan, "nan of the largest value"),
        (lambda x: function(x)[:1], r"gives \(1, 3, 5, 6\) rather than \(2, 3, 5, 6\)"),
        (failing, "cannot run on a batch of 2 of 5x6 pixels.*no such kernel"),
    ):
        with pytest.raises(RuntimeError, match=message):
            compare(function, graph, sizes, "graph")


def test_the_graph_of_a_super_resolution_run_says_how_many_times_larger(classes, tmp_path):
    unet = network(**LIGHT, in_channels=2)
    larger = save(unet, tmp_path / "larger", SuperResolutionPipeline, scale=3)
    fields = fields_of(HeadFunction(unet, "noise"), Sizes.of_network(unet), "onnx", larger)
    assert (fields["scale"], fields["output"]) == ("3", "prediction")
    unet = network(**LIGHT, num_class_embeds=4)
    assert "scale" not in fields_of(HeadFunction(unet, "noise"), Sizes.of_network(unet), "onnx", classes)


def test_an_export_that_disagrees_leaves_nothing_behind(masks, tmp_path, monkeypatch):
    monkeypatch.setattr("unet_diffusion.commands.export.graphs.TOLERANCE", -1)
    with pytest.raises(SystemExit, match="segmentation.pt2 differs from the network by"):
        run("export", ["--format", "torch-export", str(masks), str(tmp_path / "graphs")])
    monkeypatch.setattr(
        "unet_diffusion.commands.export.single_file.save_file", lambda t, *rest: save_file(other(t), *rest)
    )

    def other(tensors):
        return {**tensors, "unet.segmentation_head.bias": tensors["unet.segmentation_head.bias"] + 1}

    with pytest.raises(SystemExit, match="unet.segmentation_head.bias was read back with other numbers"):
        run("export", ["--format", "safetensors-single", str(masks), str(tmp_path / "masks.safetensors")])
    assert list(tmp_path.iterdir()) == []


def test_runs_without_a_graph_are_refused_before_anything_is_written(masks, classes, tmp_path, monkeypatch):
    unet = network(**LIGHT)
    classifier = PixelClassifier.beside(unet, 2, (20, 40), hidden=(8,))
    labelled = save(network(**LIGHT, num_classes=3, num_class_embeds=4), tmp_path / "labelled")
    level = save(stock(time_embedding_type="fourier"), tmp_path / "level")
    features = save(unet, tmp_path / "features", classifier=classifier)
    target = tmp_path / "graphs"
    for folder, form, head, message in (
        (classes, "onnx", "segmentation", "head is 'segmentation', but the network of .* only has 'noise'"),
        (masks, "onnx", "noise", "head is 'noise', but the network of .* only has 'segmentation'"),
        (features, "onnx", None, "come from a pixel classifier, .*; set head='noise'"),
        (labelled, "torch-export", None, "segmentation head of .* cannot be exported: class_labels are missing"),
        (level, "onnx", "segmentation", "cannot be exported: segmentation_timestep is 0, but .* Set head='noise'"),
        (masks, "self-contained", "segmentation", "head is 'segmentation', but 'self-contained' writes all of a run"),
        (masks, "pickle", None, "format is 'pickle', but must be one of 'self-contained', 'onnx', 'torch-export'"),
        (masks, "safetensors-single", None, "graphs, but must be a file ending in .safetensors"),
        (tmp_path, "onnx", None, "there is no model_index.json"),
    ):
        with pytest.raises(ValueError, match=message):
            export(Export(folder, target, form, head))
    monkeypatch.setattr("unet_diffusion.commands.export.graphs.LARGEST_ONNX", 1000)
    with pytest.raises(ValueError, match=r"take 0.000 GiB, but an ONNX file holds less than 2 GiB; set format='tor"):
        export(Export(masks, target, "onnx"))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"format 'onnx' needs onnxruntime: pip install unet-diffusion\[export\]"):
        export(Export(masks, target, "onnx"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["features", "labelled", "level"]


# --- one file ---


def weights_of(pipe) -> dict[str, torch.Tensor]:
    networks = [name for name in ("unet", "classifier") if getattr(pipe, name, None) is not None]
    return {f"{name}.{key}": value for name in networks for key, value in getattr(pipe, name).state_dict().items()}


def words_of(pipe) -> list[dict]:
    """The configs of a pipeline and of its components, without the folder that they were read from."""
    configs = [pipe.to_json_string(), *(part.to_json_string() for part in pipe.components.values() if part is not None)]
    return [{k: v for k, v in json.loads(config).items() if k != "_name_or_path"} for config in configs]


def saved_runs(folder: Path) -> list[tuple[type, Path]]:
    """A run of each kind of pipeline and network; one with batch norm, one in half precision, one in several files."""
    unet = network(**LIGHT, norm="batch")
    save(network(num_classes=3), folder / "shards")
    (folder / "shards" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    network(num_classes=3).save_pretrained(folder / "shards" / "unet", max_shard_size="20KB")
    classifier = PixelClassifier.beside(unet, 2, (20, 40), hidden=(8,))
    colours = [[0, 0, 0], [255, 0, 0], [0, 0, 255]]
    return [
        (SegmentationPipeline, save(network(num_classes=3), folder / "masks", palette=colours)),
        (SegmentationPipeline, save(unet, folder / "features", classifier=classifier)),
        (SegmentationPipeline, folder / "shards"),
        (SegmentationPipeline, save(stock(), folder / "stock", pixel_range=PIXEL_RANGE)),
        (ImageGenerationPipeline, save(network().bfloat16(), folder / "half", ImageGenerationPipeline)),
        (DDPMPipeline, save(network(), folder / "ddpm", DDPMPipeline)),
        (SuperResolutionPipeline, save(network(in_channels=2), folder / "larger", SuperResolutionPipeline, scale=3)),
    ]


def test_a_single_file_restores_every_weight_and_config_of_a_run(tmp_path, capsys):
    for kind, folder in saved_runs(tmp_path):
        path = tmp_path / f"{folder.name}.safetensors"
        run("export", ["--format", "safetensors-single", str(folder), str(path)])
        assert "each bit for bit that of the run" in capsys.readouterr().out
        expected, found = kind.from_pretrained(folder), load_single_file(path)
        assert type(found) is kind
        before, after = weights_of(expected), weights_of(found)
        assert before.keys() == after.keys() == load_file(path).keys()
        for name, value in before.items():
            assert after[name].dtype == value.dtype and torch.equal(after[name], value), name
        stored = {
            f"{part.parent.name}.{key}": value
            for part in folder.glob("*/*.safetensors")
            for key, value in load_file(part).items()
        }
        assert {key: value.dtype for key, value in load_file(path).items()} == {
            key: value.dtype for key, value in stored.items()
        }
        assert all(torch.equal(value, stored[key]) for key, value in load_file(path).items())
        assert words_of(found) == words_of(expected)
        assert not found.unet.training
    image = np.random.default_rng(0).integers(0, 256, (13, 18), dtype=np.uint8)
    for name in ("masks", "features"):
        pipes = [SegmentationPipeline.from_pretrained(tmp_path / name)]
        pipes.append(load_single_file(tmp_path / f"{name}.safetensors"))
        (first,), (second,) = (pipe(image).probabilities for pipe in pipes)
        np.testing.assert_array_equal(first, second)


def test_a_single_file_that_is_damaged_or_names_other_code_is_refused(masks, tmp_path):
    good = tmp_path / "good.safetensors"
    export(Export(masks, good, "safetensors-single"))
    with safe_open(good, "pt") as file:
        metadata = file.metadata()
    tensors, index = load_file(good), json.loads(metadata["model_index"])
    bias = "unet.segmentation_head.bias"

    def changed(**entries) -> dict[str, str]:
        return {**metadata, "model_index": json.dumps({**index, **entries})}

    bad = tmp_path / "bad.safetensors"
    for weights, words, message in (
        (tensors, {}, "has no model_index as JSON; give a file written by unet-diffusion export"),
        (tensors, {**metadata, "unet": "[]"}, "has no unet as JSON"),
        (tensors, changed(_class_name="Popen"), "is a pipeline of other code, Popen"),
        (tensors, changed(_class_name=["code", "Mine"]), "is a pipeline of other code"),
        (tensors, changed(unet=["os", "system"]), "only code of diffusers and of this package is run"),
        (tensors, changed(unet=["diffusers", "DDPMPipeline"]), "no such network or scheduler"),
        (tensors, changed(_palette=5), "palette is 5, but each entry must be red, green and blue"),
        (tensors, {**metadata, "unet": '{"channels": []}'}, "the UNet of .* cannot be made: channels"),
        (tensors, changed(_class_name="DDPMPipeline", scheduler=None), "does not make a DDPMPipeline"),
        (
            {bias: tensors[bias]},
            metadata,
            "another network: 35 are missing, unexpected or of another shape, such as bridge",
        ),
        ({**tensors, bias: tensors[bias] * torch.nan}, metadata, "segmentation_head.bias in .* holds NaN or infinite"),
    ):
        save_file(weights, bad, words)
        with pytest.raises(ValueError, match=message):
            load_single_file(bad)
    bad.write_bytes(good.read_bytes()[:100])
    for path in (bad, tmp_path / "absent.safetensors"):
        with pytest.raises(ValueError, match="cannot be read as safetensors"):
            load_single_file(path)
