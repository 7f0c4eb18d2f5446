"""MkDocs hooks: pages outside docs/, links that work on the site and in the repository, formulas as MathML."""

import html
import os
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.structure.files import File

README = "quickstart.md"  # the README's name on the site
INCLUDED = ("experiments/results/**/*.md", "experiments/results/**/*.png", "hourglass_jax/weights/*/README.md")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\s*\\[(\[](.*?)\\[)\]]\s*</\1>', re.S)
LINK = re.compile(r"(?<!`)(!?)\[([^]]*)\]\(([^)\s]+)\)")


def on_files(files, config):
    """Add the README, the records of results and the model cards to the site."""
    root = Path(config.docs_dir).parent
    files.append(File.generated(config, README, abs_src_path=str(root / "README.md")))
    for pattern in INCLUDED:
        for path in sorted(root.glob(pattern)):
            files.append(File.generated(config, site_path(path, root), abs_src_path=str(path)))
    return files


def site_path(path, root):
    """Return the path on the site of a file in the repository."""
    relative = path.relative_to(root).as_posix()
    if relative == "README.md":
        return README
    return relative.removeprefix("docs/").replace("README.md", "index.md")


def on_page_markdown(markdown, page, config, files):
    """Resolve links relative to the repository; replace a link to a file that is not on the site by its text."""
    root = Path(config.docs_dir).parent
    here = Path(page.file.abs_src_path).parent

    def resolve(match):
        image, text, target = match.groups()
        path, hash_, fragment = target.partition("#")
        file = (here / path).resolve()
        if not path or "://" in target or not file.exists() or not file.is_relative_to(root):
            return match[0]  # MkDocs checks it
        found = site_path(file, root)
        if not files.get_file_from_path(found):
            return text
        relative = os.path.relpath(found, os.path.dirname(page.file.src_uri) or ".")
        return f"{image}[{text}]({relative}{hash_}{fragment})"

    return LINK.sub(resolve, markdown)


def on_page_content(content, **_):
    """Write formulas as MathML, which browsers render without scripts, and unfold the source beside the equations."""

    def formula(match):
        display = "block" if match[1] == "div" else "inline"
        return convert(html.unescape(match[2]).strip(), display=display)

    content = FORMULA.sub(formula, content)
    return content.replace('<details class="mkdocstrings-source">', '<details class="mkdocstrings-source" open>')
