"""Imports slow modules of the package late, and moved modules under their former names."""

import sys
import warnings
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, module_from_spec, spec_from_loader
from threading import RLock
from types import ModuleType
from typing import Any

PACKAGE = __name__.partition(".")[0]
LOCK = RLock()
MOVED = {  # documented modules of the former flat package, and the modules that hold their parts today
    "attention": "network.attention",
    "augmentation": "data.masked.config data.masked.augmentation",
    "blocks": "network.blocks network.feature_maps",
    "checkpoints": "training.checkpoints",
    "classifier": "commands.train_classifier evaluation.classifier",
    "diffusion_task": "tasks.config tasks.diffusion",
    "doctor": "commands.doctor.command",
    "embeddings": "network.embeddings",
    "evaluate": "commands.evaluate",
    "evaluate_generation": "commands.evaluate_generation",
    "export": "commands.export.command",
    "feature_networks": "evaluation.feature_networks",
    "findings": "commands.doctor.findings",
    "frozen_features_task": "tasks.config tasks.frozen_features",
    "generation": "commands.sample",
    "generation_metrics": "evaluation.generation_metrics",
    "joint_task": "tasks.joint",
    "low_resolution": "diffusion.low_resolution",
    "masked_data": "data.masked.config data.masked.sets data.masked.dataset",
    "memorisation": "evaluation.memorisation",
    "metrics": "segmentation.metrics",
    "networks": "saved_runs",
    "objectives": "diffusion.objectives",
    "palette": "images.palette",
    "pixels": "images.pixel_range images.decoding",
    "sampling": "diffusion.sampling",
    "segment": "commands.segment",
    "segmentation_task": "tasks.config tasks.segmentation",
    "self_training_task": "tasks.self_training",
    "single_file": "commands.export.single_file",
    "super_resolution_task": "tasks.config tasks.super_resolution",
    "task": "training.task",
    "tiling": "network.tiling",
    "train_ddpm": "commands.train_ddpm",
    "train_segmentation": "commands.train_segmentation",
    "training_config": "training.config",
    "unlabelled": "tasks.config",
    "upscale": "commands.upscale",
}
RENAMED = {"mask_picture": "mask_image", "PictureClassifier": "ImageClassifier"}


class LateModule(ModuleType):
    """A module that runs when something in it is first used.

    Unlike `importlib.util.LazyLoader`, it answers special attributes such as `__file__` without running, since torch
    reads those of all imported modules while it is imported. Threads wait for each other.
    """

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("__") and name not in ("__dict__", "__all__"):
            return ModuleType.__getattribute__(self, name)
        with LOCK:
            spec = ModuleType.__getattribute__(self, "__spec__")
            if not spec.loader_state:  # else it is running, or has run
                spec.loader_state = "started"
                try:
                    spec.loader.exec_module(self)
                except BaseException:
                    spec.loader_state = None
                    raise
                self.__class__ = ModuleType  # type: ignore[assignment]
            return ModuleType.__getattribute__(self, name)


def import_late(name: str) -> ModuleType:
    """Adds a module of the package to the imported ones without running it; a module that is already there stays."""
    if name in sys.modules:
        return sys.modules[name]
    spec = find_spec(name)
    assert spec is not None
    module = module_from_spec(spec)
    module.__class__ = LateModule  # type: ignore[assignment]  # allowed for modules
    sys.modules[name] = module
    return module


class FormerNames:
    """Imports a module under its former name, with the attributes of the modules that hold its parts today.

    It is a finder and loader of modules. It has no base class from `importlib.abc`, whose import takes milliseconds.
    """

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """Finds the modules of the table."""
        package, _, name = fullname.partition(".")
        return spec_from_loader(fullname, self) if package == PACKAGE and name in MOVED else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> None:
        """Leaves making the module to Python."""

    def exec_module(self, module: ModuleType) -> None:
        """Fills the module, and warns that it has moved."""
        places = [f"{PACKAGE}.{name}" for name in MOVED[module.__name__.partition(".")[2]].split()]
        warnings.warn(f"{module.__name__} has moved to {' and '.join(places)}.", DeprecationWarning, stacklevel=2)
        held = {name: value for place in places for name, value in vars(import_module(place)).items()}
        vars(module).update({name: value for name, value in held.items() if not name.startswith("__")})
        vars(module).update({former: held[name] for former, name in RENAMED.items() if name in held})
