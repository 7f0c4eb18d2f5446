"""README and docs: their code runs, their commands parse, their links lead somewhere."""

import re
import shlex

import pytest
from launching import EXPERIMENTS, ROOT, run_forked

import hourglass_jax as hg
from hourglass_jax import registry

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^(<!-- (?P<note>[^>]*) -->\n)?```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S)
LINK = re.compile(r"\]\(([^)\s]+)\)")
MAX_SKIPPED = 2
SECTIONS = {
    "model": hg.HourglassConfig,
    "data": hg.DataConfig,
    "optimizer": hg.OptimizerConfig,
    "train": hg.TrainConfig,
    "runtime": hg.RuntimeConfig,
}
SHORTER = {"steps=100, eval_interval=50": "steps=2, eval_interval=2", "range(20)": "range(2)", "-20_000": "-500"}


def blocks(page, *languages):
    return [match for match in BLOCK.finditer(page.read_text()) if match["language"] in languages]


def skipped(block):
    return (block["note"] or "").startswith("skip-test: ")


def shortened(code):
    """The same with less training, which these tests are not about."""
    for long, short in SHORTER.items():
        code = code.replace(long, short)
    return code


def name(page):
    return page.name


WITH_CODE = [page for page in PAGES if blocks(page, "python")]


@pytest.fixture
def own_registries():
    """Methods that a page registers stay its own."""
    registries = (registry.SHORTENINGS, registry.UPSAMPLINGS, registry.BOUNDARIES)
    before = [dict(entries) for entries in registries]
    yield
    for entries, known in zip(registries, before, strict=True):
        entries.clear()
        entries.update(known)


@pytest.mark.launchers
@pytest.mark.usefixtures("own_registries")
@pytest.mark.parametrize("page", WITH_CODE, ids=name)
def test_code_blocks_of_a_page_run_one_after_the_other(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": page.stem}
    for block in blocks(page, "python"):
        if not skipped(block):
            exec(compile(shortened(block["code"]), f"{page.name}, {block['code'][:40]!r}", "exec"), namespace)


def test_few_code_blocks_are_skipped_and_each_has_a_reason():
    notes = [block["note"] for page in PAGES for block in blocks(page, "python") if skipped(block)]
    assert len(notes) <= MAX_SKIPPED


def commands(page):
    """The launcher and the arguments of each command line of a page."""
    for block in blocks(page, ""):
        for line in block["code"].replace("\\\n", " ").splitlines():
            if match := re.match(r"python experiments/(\S+)\.py(.*)", line):
                yield match[1], shlex.split(match[2], comments=True)


COMMANDS = sorted({(launcher, *arguments) for page in PAGES for launcher, arguments in commands(page)})


def test_the_pages_show_the_launchers():
    shown = {launcher for launcher, *_ in COMMANDS}
    assert {
        "pretrain",
        "finetune",
        "generate",
        "evaluate",
        "convert",
        "ablate",
        "benchmark",
        "compile",
        "prepare",
    } <= shown


@pytest.mark.parametrize("launcher", sorted({command[0] for command in COMMANDS}))
def test_every_flag_of_a_command_line_exists(launcher, tmp_path):
    assert (EXPERIMENTS / f"{launcher}.py").is_file()
    known = set(re.findall(r"^ *--(?:\[no\])?([\w.]+):", run_forked(launcher, "--helpfull", cwd=tmp_path).stdout, re.M))
    known |= {f"{name}.{field}" for name in SECTIONS.keys() & known for field in SECTIONS[name].__dataclass_fields__}
    given = {
        re.match(r"--([\w.]+)", argument)[1]
        for command, *arguments in COMMANDS
        if command == launcher
        for argument in arguments
        if argument.startswith("--")
    }
    assert given <= known


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"], ids=name)
def test_links_to_files_of_the_repository_lead_somewhere(page):
    targets = {target.partition("#")[0] for target in LINK.findall(page.read_text()) if "://" not in target}
    assert not [target for target in targets if target and not (page.parent / target).exists()]


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= 180


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    assert all(page.name in navigation for page in PAGES if page is not README)
