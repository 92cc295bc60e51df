"""MkDocs hooks that make the documents read the same on the site as on a git host.

Some pages lie in the root of the repository, so they are added here. Links in the sources are relative to their file.
Links to files that are not pages lead to the repository if mkdocs.yml has its address (`repo_url`), and become plain
text otherwise.
"""

import re
import shutil
import subprocess
import sys
from os.path import relpath
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]*)\]\((?P<path>[^)#:\s]+)(?P<anchor>#[^)\s]*)?\)")


def on_startup(command: str, dirty: bool) -> None:
    """Lays the package out as a wheel does, with pipelines/ inside, for the pages of the API."""
    target = ROOT / "build" / "documented"
    shutil.rmtree(target, ignore_errors=True)
    setup = [sys.executable, "-c", "import setuptools; setuptools.setup()", "--quiet", "build_py", "--build-lib"]
    subprocess.run([*setup, str(target)], cwd=ROOT, check=True, capture_output=True)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that lie in the root of the repository."""
    for source, page in PAGES.items():
        if files.get_file_from_path(page) is None and (ROOT / source).exists():
            files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links to files into links to pages, links to the repository, or plain text."""
    file = page.file
    source = next(
        (ROOT / name for name, uri in PAGES.items() if uri == file.src_uri != "index.md"), DOCS / file.src_uri
    )

    def resolved(link: re.Match[str]) -> str:
        target = (source.parent / link["path"]).resolve()
        if not target.is_relative_to(ROOT) or not target.exists():
            return link[0]  # left for MkDocs to check
        name = target.relative_to(ROOT).as_posix()
        uri = target.relative_to(DOCS).as_posix() if target.is_relative_to(DOCS) else PAGES.get(name)
        if uri is not None:
            return f"[{link['text']}]({relpath(uri, Path(file.src_uri).parent)}{link['anchor'] or ''})"
        if config.repo_url:
            return f"[{link['text']}]({config.repo_url.rstrip('/')}/blob/HEAD/{name})"
        return str(link["text"])

    return LINK.sub(resolved, markdown)
