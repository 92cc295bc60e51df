"""Runs that are exported with their code: loaded by diffusers' own functions, without the package."""

import ast
import importlib.util
import inspect
import json
import re
import subprocess
import sys
from fnmatch import fnmatch
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages
from types import SimpleNamespace

import pytest
from diffusers import AutoModel, DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines import pipeline_utils
from diffusers.utils import dynamic_modules_utils

import unet_diffusion
from tests.support.exports import CODE, assert_equal_to_the_runs, outputs_elsewhere
from tests.support.tiny import network
from unet_diffusion import UNet
from unet_diffusion.cli import run
from unet_diffusion.commands.export.command import export
from unet_diffusion.commands.export.source_bundle import bundle
from unet_diffusion.commands.options.export import Export
from unet_diffusion.images.pixel_range import PixelRange
from unet_diffusion.pipelines import ImageGenerationPipeline

MODULES = [
    import_module(info.name)
    for package in (unet_diffusion, unet_diffusion.pipelines)  # in a checkout, the pipelines are in a separate folder
    for info in walk_packages(package.__path__, f"{package.__name__}.")
]
KINDS = [
    kind
    for module in MODULES
    for kind in vars(module).values()
    if isinstance(kind, type)
    and issubclass(kind, (ModelMixin, DiffusionPipeline))
    and kind.__module__ == module.__name__
]
PIPELINES = [kind for kind in KINDS if issubclass(kind, DiffusionPipeline)]
NEEDED = {"PIL", "diffusers", "einops", "fsspec", "numpy", "safetensors", "torch"}  # one install of its README
OPTIONAL = ("imagecodecs", "tifffile", "zarr")


# --- loading ---


@pytest.mark.slow
def test_without_the_package_the_outputs_are_those_of_the_run(runs, exports, tmp_path):
    """Neither the package nor the libraries that only some images need can be imported, and there is no warning."""
    block = f"import sys; sys.modules.update(dict.fromkeys({('unet_diffusion', *OPTIONAL)}))"
    assert_equal_to_the_runs(outputs_elsewhere(sys.executable, block, exports, tmp_path), runs)


@pytest.mark.slow
def test_beside_the_installed_package_the_outputs_are_the_same(runs, exports, tmp_path):
    before = f"import sys; sys.path.insert(0, {str(Path(__file__).parents[3])!r}); import unet_diffusion.pipelines"
    assert_equal_to_the_runs(outputs_elsewhere(sys.executable, before, exports, tmp_path), runs)


def test_code_is_not_run_without_trust(exports):
    for kind, name in ((AutoModel, "generation/unet"), (DDPMPipeline, "generation"), (DiffusionPipeline, "classifier")):
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            kind.from_pretrained(exports / name)


def test_the_package_loads_an_exported_network_without_trust_or_warning(runs, exports, caplog, monkeypatch):
    monkeypatch.setattr(pipeline_utils.logging.get_logger("diffusers"), "propagate", True)
    unet = UNet.from_pretrained(exports / "generation" / "unet")
    assert caplog.records == []
    assert dict(unet.config) == {
        **UNet.from_pretrained(runs / "generation" / "unet").config,
        "_name_or_path": unet.config["_name_or_path"],
    }


@pytest.mark.parametrize("name", ["generation", "classifier"])
def test_diffusers_downloads_from_the_hub_all_that_an_export_needs(name, exports, tmp_path, monkeypatch):
    """A folder stands for the Hub, and only requested files arrive; helper files beside a network would not."""
    source, cache = exports / name, tmp_path / "cache" / "snapshots" / ("0" * 40)
    files = [str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()]

    def hf_hub_download(repo: str, file: str, **_) -> str:
        (cache / file).parent.mkdir(parents=True, exist_ok=True)
        (cache / file).write_bytes((source / file).read_bytes())
        return str(cache / file)

    def snapshot_download(repo: str, allow_patterns: list[str], ignore_patterns: list[str], **_) -> str:
        for file in files:
            if any(fnmatch(file, p) for p in allow_patterns) and not any(fnmatch(file, p) for p in ignore_patterns):
                hf_hub_download(repo, file)
        return str(cache)

    info = SimpleNamespace(sha="0" * 40, siblings=[SimpleNamespace(rfilename=file) for file in files])
    for module in (pipeline_utils, dynamic_modules_utils):
        monkeypatch.setattr(module, "hf_hub_download", hf_hub_download)
        monkeypatch.setattr(module, "model_info", lambda *_, **__: info)
    monkeypatch.setattr(pipeline_utils, "snapshot_download", snapshot_download)
    monkeypatch.setattr(pipeline_utils, "_resolve_revision", lambda *_, **__: "0" * 40)
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))

    pipe = DiffusionPipeline.from_pretrained("somebody/network", trust_remote_code=True)
    assert type(pipe).__name__ == {"generation": "DDPMPipeline"}.get(name, "SegmentationPipeline")
    assert type(pipe.unet).__module__.endswith(CODE.format("unet"))
    assert not (cache / "README.md").exists()


# --- the code that travels ---


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_file_holds_the_class_as_it_is_written_and_imports_nothing_from_the_package(kind):
    text = bundle(kind)
    imported = set()
    for node in ast.parse(text).body:
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module.partition(".")[0])
    assert imported - set(sys.stdlib_module_names) <= NEEDED
    assert inspect.getsource(kind) in text
    assert text.startswith("# Copyright") and "http://www.apache.org/licenses/LICENSE-2.0" in text


def test_every_name_in_the_files_is_defined_once_and_used(tmp_path):
    """By the rules of pyflakes: no undefined name, no name defined twice, no unused import."""
    for kind in KINDS:
        (tmp_path / f"{kind.__name__}.py").write_text(bundle(kind))
    check = [sys.executable, "-m", "ruff", "check", "--isolated", "--target-version", "py311", "--select", "F,E9"]
    result = subprocess.run([*check, str(tmp_path)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_an_exported_pipeline_defines_no_network_and_checks_for_no_network_class():
    """A copy of a class would be another class; and `ModelMixin`, which stands for it, is too wide for `isinstance`."""
    for kind in PIPELINES:
        nodes = list(ast.walk(ast.parse(bundle(kind))))
        bases = {ast.unparse(base) for node in nodes if isinstance(node, ast.ClassDef) for base in node.bases}
        assert not bases & {"ModelMixin", "nn.Module"}
        aliases = [alias for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names]
        networks = {alias.asname for alias in aliases if alias.name == "ModelMixin"}
        for node in nodes:
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
                assert not networks & {name.id for name in ast.walk(node.args[1]) if isinstance(name, ast.Name)}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_diffusers_demands_what_is_needed_and_not_what_is_optional(kind, tmp_path, monkeypatch):
    file, warned = tmp_path / "code.py", []
    file.write_text(bundle(kind))
    monkeypatch.setattr(dynamic_modules_utils.logger, "warning", warned.append)
    for name in OPTIONAL:
        monkeypatch.setitem(sys.modules, name, None)
    assert dynamic_modules_utils.check_imports(file) == [] and warned == []
    monkeypatch.setitem(sys.modules, "torch", None)
    dynamic_modules_utils.check_imports(file)
    assert "pip install torch" in warned[0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("SHARED", r"SHARED of unet_diffusion.(left|right)_SHARED is also unet_diffusion.(left|right)_SHARED.SHARED"),
        ("sum", "sum of unet_diffusion.right_sum is also builtins.sum"),
    ],
)
def test_names_that_would_replace_one_another_are_refused(name, message, tmp_path, monkeypatch):
    sources = {
        f"right_{name}": f"{name} = 2\ndef taken():\n    return {name}\n",
        f"left_{name}": (
            f"from unet_diffusion.right_{name} import taken\nSHARED = 1\nclass Kind:\n    value = SHARED, taken\n"
        ),
    }
    for module, text in sources.items():
        (tmp_path / f"{module}.py").write_text(text)
        spec = importlib.util.spec_from_file_location(f"unet_diffusion.{module}", tmp_path / f"{module}.py")
        loaded = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, loaded)
        spec.loader.exec_module(loaded)
    with pytest.raises(ValueError, match=message):
        bundle(loaded.Kind)


# --- the folder ---


def test_the_folder_holds_what_is_loaded_and_says_how(runs, exports):
    found = {str(path.relative_to(exports)) for path in exports.rglob("*") if path.is_file()}
    weights = "diffusion_pytorch_model.safetensors"
    code = CODE.format
    assert found == {
        *(
            f"{name}/{file}"
            for name in ("generation", "segmentation", "classifier", "larger")
            for file in ("README.md", "model_index.json")
        ),
        *(
            f"{name}/unet/{file}"
            for name in ("generation", "segmentation", "classifier", "larger")
            for file in ("config.json", weights, f"{code('unet')}.py")
        ),
        *(f"classifier/classifier/{file}" for file in ("config.json", weights, f"{code('adapters')}.py")),
        *(f"{name}/scheduler/scheduler_config.json" for name in ("generation", "classifier", "larger")),
        f"generation/{code('image_generation')}.py",
        f"larger/{code('super_resolution')}.py",
        *(f"{name}/{code('segmentation')}.py" for name in ("segmentation", "classifier")),
    }
    for saved in runs.rglob("*.safetensors"):
        assert (exports / saved.relative_to(runs)).read_bytes() == saved.read_bytes()
    for name, pipe in (
        ("generation", "DDPM"),
        *((each, "Diffusion") for each in ("segmentation", "classifier", "larger")),
    ):
        text = (exports / name / "README.md").read_text()
        assert f'{pipe}Pipeline.from_pretrained("{name}", trust_remote_code=True)' in text
        assert f'AutoModel.from_pretrained("{name}/unet", trust_remote_code=True)' in text
    for name, result in (("segmentation", 'masks[0].save("mask.png")'), ("larger", 'images[0].save("large.png")')):
        assert result in (exports / name / "README.md").read_text()
    assert f'custom_pipeline="{code("image_generation")}"' in (exports / "generation" / "README.md").read_text()


@pytest.mark.parametrize(
    ("unet", "timesteps", "arguments", "shown"),
    [
        ({}, 4, {}, "pipe(num_inference_steps=4).images[0].save"),
        ({"num_class_embeds": 3}, 4, {}, "pipe(num_inference_steps=4, class_labels=0).images[0].save"),
        ({}, 4, {"pixel_range": PixelRange((0.0,), (9.0,), "uint16").to_dict()}, "images[0].save"),
        ({"in_channels": 5, "out_channels": 5}, 4, {}, 'pipe(num_inference_steps=4, output_type="stored").images'),
    ],
)
def test_the_code_in_the_readme_of_an_exported_generator_executes(
    unet, timesteps, arguments, shown, tmp_path, monkeypatch
):
    scheduler = DDPMScheduler(num_train_timesteps=timesteps)
    ImageGenerationPipeline(network(**unet), scheduler, **arguments).save_pretrained(tmp_path / "run")
    export(Export(tmp_path / "run", tmp_path / "folder"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    blocks = re.findall(r"```python\n(.*?)```", (tmp_path / "folder" / "README.md").read_text(), re.S)
    assert any(shown in block for block in blocks)
    for block in blocks:
        exec(block, {})
    assert (tmp_path / "sample.png").exists() == ("save" in shown)


def test_a_stock_pipeline_around_our_network_is_exported_under_its_own_name(tmp_path, capsys):
    DDPMPipeline(network(), DDPMScheduler()).save_pretrained(tmp_path / "run")
    run("export", ["--format", "self-contained", str(tmp_path / "run"), str(tmp_path / "folder")])
    assert capsys.readouterr().out.strip() == str(tmp_path / "folder")
    index = json.loads((tmp_path / "folder" / "model_index.json").read_text())
    assert index["_class_name"] == "DDPMPipeline"
    assert index["unet"] == [CODE.format("unet"), "UNet"]
    assert not list((tmp_path / "folder").glob("*.py"))


def test_runs_that_cannot_be_exported_are_refused_and_leave_nothing(runs, tmp_path):
    (tmp_path / "there").mkdir()
    DDPMPipeline(
        UNet2DModel(
            16, 1, 1, block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)
        ),
        DDPMScheduler(),
    ).save_pretrained(tmp_path / "stock")
    half = tmp_path / "half"
    (half / "unet").mkdir(parents=True)
    (half / "model_index.json").write_bytes((runs / "segmentation" / "model_index.json").read_bytes())
    newer = tmp_path / "newer"
    newer.mkdir()
    (newer / "model_index.json").write_text('{"_class_name": "DDPMPipeline", "unet": ["unet_diffusion.unet", "VNet"]}')
    for run_folder, target, message in (
        (tmp_path / "there", "folder", "there is no model_index.json; give the folder of a finished run"),
        (runs / "generation", "there", "exists already; remove it, or choose another name"),
        (tmp_path / "stock", "folder", "holds no network that needs unet_diffusion"),
        (half, "folder", "unet holds no weights or no config"),
        (newer, "folder", "names unet_diffusion.unet.VNet, but there is no such network"),
    ):
        with pytest.raises(ValueError, match=message):
            export(Export(run_folder, tmp_path / target))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["half", "newer", "stock", "there"]
