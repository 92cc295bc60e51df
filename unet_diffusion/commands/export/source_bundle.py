"""The source of one class of the package, with everything that it needs from the package, as one file.

Diffusers runs code beside weights in this form. For a pipeline on the Hub, it downloads one file per class. All local
code shares one folder and one set of module names, so separate helper files of several checkpoints would get mixed up.
"""

import ast
import builtins
import importlib
import inspect
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache

from torch import nn

from unet_diffusion.version import __version__

PACKAGE = "unet_diffusion"
HEADER = '''\
# Copyright The unet-diffusion developers.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""`{name}` of unet-diffusion {version} and what it needs of that package, joined by `unet-diffusion export`.

Networks and pipelines have a file each. A pipeline knows networks by the classes of diffusers that they derive from.
"""
'''

Origin = tuple[str, str | None]  # a module, and a name in it; None for the module itself


@dataclass(frozen=True)
class Module:
    """The top level of a module of the package: its lines, and its definitions and imports by name."""

    lines: list[str]
    definitions: dict[str, ast.stmt]
    imports: dict[str, Origin]


def bundle(kind: type) -> str:
    """The source of a file that defines a class of the package without importing the package.

    It holds the definitions that the class reaches, unchanged, in an order that runs. Imports inside functions are
    optional; they are hidden from diffusers, which requires every import that it sees.

    The file of a pipeline holds no networks: these have their own files, and a copy would be another class. The
    pipeline knows them by the class of diffusers that they are derived from.
    """
    with_networks = issubclass(kind, nn.Module)
    origins: dict[str, Origin] = {}  # of every name at the top level of the file
    waiting = [(kind.__module__, kind.__name__)]
    while waiting:
        place, name = waiting.pop()
        origin = origin_of(place, name, with_networks)
        if origin is None or origins.get(name) == origin:
            continue
        if hasattr(builtins, name) or name in origins:
            other = origins.get(name, ("builtins", name))
            raise ValueError(
                f"{name} of {place} is also {'.'.join(map(str, other))}, so they cannot be in one file with "
                f"{kind.__name__}; rename one of them in the package."
            )
        origins[name] = origin
        if of_package(origin[0]):
            nodes = ast.walk(read_module(origin[0]).definitions[name])
            waiting += [(origin[0], node.id) for node in nodes if isinstance(node, ast.Name)]

    imports = {name: origin for name, origin in origins.items() if not of_package(origin[0])}
    header = HEADER.format(name=kind.__name__, version=__version__)
    parts = ["\n".join([header, *import_lines(imports)])]
    for place in dependencies_first(kind.__module__):
        names = {name for name, origin in origins.items() if origin[0] == place}
        if names:
            parts.append(f"# From {place.replace('.', '/')}.py\n\n{source(read_module(place), names)}")
    return "\n\n\n".join(parts) + "\n"


def origin_of(place: str, name: str, with_networks: bool) -> Origin | None:
    """The place where a top-level name of a module of the package is defined; None if there is no such name.

    Without networks, a network is replaced by the class of diffusers that it is derived from.
    """
    module = read_module(place)
    if name in module.definitions:
        return place, name
    origin = module.imports.get(name)
    if origin is None or not of_package(origin[0]):
        return origin
    assert origin[1] == name, f"{place} imports {origin} under another name"
    found = (None if with_networks else base_of_network(origin[0], name)) or origin_of(origin[0], name, with_networks)
    assert found is not None, f"{place} imports {origin}, which is a module"
    return found


@cache
def read_module(place: str) -> Module:
    """Reads the source of a module of the package, whose top level holds imports and definitions only."""
    text = inspect.getsource(importlib.import_module(place))
    module = Module(text.splitlines(), {}, {})
    for node in ast.parse(text).body:
        if isinstance(node, ast.ImportFrom):
            assert node.module is not None and not node.level, f"{place} imports relatively"
            module.imports.update({alias.asname or alias.name: (node.module, alias.name) for alias in node.names})
        elif isinstance(node, ast.Import):
            module.imports.update({alias.asname or alias.name: (alias.name, None) for alias in node.names})
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            module.definitions[node.name] = node
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            module.definitions.update({target.id: node for target in targets if isinstance(target, ast.Name)})
        else:
            assert isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant), f"{place}:{node.lineno}"
        if not isinstance(node, (ast.Import, ast.ImportFrom)):
            _hide_imports(module.lines, node)
    return module


def _hide_imports(lines: list[str], definition: ast.stmt) -> None:
    """Rewrites the imports inside a definition, so that `diffusers.utils.dynamic_modules_utils` ignores them."""
    for node in ast.walk(definition):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            line = lines[node.lineno - 1]
            assert node.lineno == node.end_lineno and PACKAGE not in line, line
            indent = " " * (node.col_offset + 4)
            broken = re.sub(r"^(\s*from \S+) import", rf"\1 \\\n{indent}import", line)
            lines[node.lineno - 1] = f"{broken}  # optional"


def of_package(place: str) -> bool:
    """Returns whether a module belongs to this package."""
    return place.partition(".")[0] == PACKAGE


def base_of_network(place: str, name: str) -> Origin | None:
    """The class of diffusers that a network, or a part of one, is derived from; None for anything else."""
    value = getattr(importlib.import_module(place), name)
    if not (isinstance(value, type) and issubclass(value, nn.Module)):
        return None
    base = next(kind for kind in value.__mro__ if kind.__module__.startswith("diffusers."))
    return base.__module__, base.__name__


def import_lines(imports: dict[str, Origin]) -> Iterator[str]:
    """Yields import lines that bind the names: modules first, then names from modules, in order."""
    taken: dict[str, list[str]] = {}
    for name, (place, wanted) in sorted(imports.items()):
        if wanted is None:
            yield f"import {place}" if name == place else f"import {place} as {name}"
        else:
            taken.setdefault(place, []).append(name if name == wanted else f"{wanted} as {name}")
    for place in sorted(taken):
        yield f"from {place} import {', '.join(taken[place])}"


def dependencies_first(place: str) -> list[str]:
    """Returns a module of the package and the modules that it imports, each after its own imports."""
    order: dict[str, None] = {}

    def visit(place: str) -> None:
        for imported, _ in read_module(place).imports.values():
            if of_package(imported) and imported not in order:
                visit(imported)
        order[place] = None

    visit(place)
    return list(order)


def source(module: Module, names: Iterable[str]) -> str:
    """Returns the unchanged text of some definitions of a module, with the comments above each."""
    nodes = {id(node): node for name, node in module.definitions.items() if name in names}
    text = ""
    for node in sorted(nodes.values(), key=lambda node: node.lineno):
        start = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))]) - 1
        while start and module.lines[start - 1].startswith("#"):
            start -= 1
        block = "\n".join(module.lines[start : node.end_lineno])
        is_value = isinstance(node, (ast.Assign, ast.AnnAssign))
        text += f"{block}\n" if is_value else f"\n\n{block}\n\n\n"
    return re.sub(r"\n{4,}", "\n\n\n", text).strip("\n")
