"""The documentation: pages build without a warning, and what they tell a reader to type does run.

A block of commands or Python is run unless its title says what a reader needs for it ("needs GPUs"). The folder that
blocks run in looks as after `make quickstart`, only that its models saw two steps.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
#: What a reader may need that is not here.
NEEDS = tuple(
    f"needs {what}" for what in ("GPUs", "the archive", "your own files", "the hub", "4 GB of disk", "its package")
)
#: Commands that other tests or the maintainers run whole: they take minutes and install packages.
ELSEWHERE = re.compile(r"^(make |pip |\. \.venv/bin/activate|vllm |text-embeddings-router )")
#: Pages whose Python needs models of its own; `tests/test_migration.py` runs that.
OWN_TEST = {"migration.md"}


class Block(NamedTuple):
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    title: str
    text: str

    @property
    def needs(self) -> bool:
        """Whether it says that it needs what is not here."""
        return self.title in NEEDS


def blocks() -> Iterator[Block]:
    """All bash and Python blocks of all pages."""
    fence = re.compile(r"^```(bash|python)(?: title=\"([^\"]*)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    for page in PAGES:
        content = page.read_text(encoding="utf-8")
        for match in fence.finditer(content):
            line = content.count("\n", 0, match.start()) + 1
            yield Block(page, line, match[1], match[2] or "", match[3])


def commands(block: Block) -> list[str]:
    """A bash block's commands, continued lines joined, without what runs elsewhere."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#") and not ELSEWHERE.match(line)]


def test_titles_are_known() -> None:
    assert {block.title for block in blocks()} <= {"", *NEEDS}


def test_many_cards_and_hub_models_are_marked() -> None:
    """What surely cannot run on a laptop says so."""
    for block in blocks():
        large = re.search(r"nproc_per_node=8|--processes 8|meta-llama/|mistralai/|McGill-NLP/", block.text)
        assert not large or block.needs or block.page.name in OWN_TEST, f"{block.page}:{block.line}"


def test_scripts_and_configs_of_all_blocks_exist() -> None:
    for block in blocks():
        for path in re.findall(r"(?:experiments|train_configs|test_configs)/[\w./-]*\w\.(?:py|json)", block.text):
            assert (ROOT / path).is_file(), f"{block.page}:{block.line}: {path}"


def test_every_page_is_in_the_menu() -> None:
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in (ROOT / "docs").rglob("*.md"):
        assert f" {page.relative_to(ROOT / 'docs').as_posix()}\n" in menu


def test_llms_txt_leads_to_pages_and_names_the_commands_with_json() -> None:
    """Its links are those of the built site, where the file lies at the root."""
    text = (ROOT / "docs/llms.txt").read_text(encoding="utf-8")
    links = re.findall(r"\]\((\S+)\.html\): \S", text)
    assert len(links) >= 16 and text.startswith("# ") and "\n> " in text
    for link in links:
        assert (ROOT / f"docs/{link}.md").is_file(), link
    pattern = r"prints_tables=True|add_json_flag"
    sources = [
        file for file in (ROOT / "llm2vec/commands").rglob("*.py") if re.search(pattern, file.read_text("utf-8"))
    ]
    commands = re.search(r"`--json` on ([^`]*?) prints", " ".join(text.split()))
    assert commands is not None
    named = {name.replace("-", "_").replace("eval", "evaluate") for name in re.split(r", | and ", commands[1])}
    assert named == {file.stem for file in sources}


def test_the_skill_has_the_front_matter_of_skills() -> None:
    lines = (ROOT / "docs/skill/SKILL.md").read_text(encoding="utf-8").splitlines()
    keys = {line.partition(": ")[0]: line.partition(": ")[2] for line in lines[1 : lines.index("---", 1)]}
    assert set(keys) == {"name", "description"} and len(keys["description"]) < 1024


@pytest.mark.slow
def test_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ("index.html", "llms.txt", "skill/SKILL.html"):
        assert (tmp_path / "site" / name).is_file()


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as after `make quickstart`, but for the number of steps."""
    folder = tmp_path_factory.mktemp("workspace")
    for name in ("experiments", "llm2vec", "test_configs"):
        (folder / name).symlink_to(ROOT / name)
    for name in ("train_configs", "docs", "results"):  # commands of the pages write there
        shutil.copytree(ROOT / name, folder / name)
    for file in (folder / "train_configs" / "quickstart").glob("*.json"):
        config = json.loads(file.read_text(encoding="utf-8"))
        if "max_steps" in config:
            config |= {"max_steps": 2, "warmup_steps": 0}
        if "stop_after_n_steps" in config:
            config |= {"stop_after_n_steps": 2}
        file.write_text(json.dumps(config), encoding="utf-8")
    for line in (
        "python experiments/make_docstrings.py --output_dir cache/docstrings",
        "python experiments/make_tiny_model.py --output_dir output/quickstart/init",
        "python experiments/run_lm.py train_configs/quickstart/pretrain.json",
        "python experiments/run_stage_I.py train_configs/quickstart/stage_I.json",
        "python experiments/run_stage_II.py train_configs/quickstart/stage_II.json",
    ):
        assert_runs(line, folder)
    return folder


def assert_runs(line: str, folder: Path) -> None:
    """A command as a reader would type it with the environment activated."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(["bash", "-c", line], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


def runnable(page: Path) -> list[Block]:
    """A page's blocks without a title."""
    return [block for block in blocks() if block.page == page and not block.needs]


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if any(block.language == "python" or commands(block) for block in runnable(page))],
    ids=lambda page: page.relative_to(ROOT).as_posix(),
)
def test_what_a_page_says_does_run(page: Path, workspace: Path) -> None:
    """A page's commands one after the other, and all its Python as one program."""
    chosen = runnable(page)
    for block in chosen:
        if block.language == "bash" and commands(block):
            assert_runs(
                "set -e\n" + block.text if "<<" in block.text else "\n".join(["set -e", *commands(block)]), workspace
            )
    program = "\n".join(block.text for block in chosen if block.language == "python")
    if program and page.name not in OWN_TEST:
        file = workspace / "program.py"
        file.write_text(program, encoding="utf-8")
        assert_runs("python program.py", workspace)


NOTEBOOK = ROOT / "docs/guides/notebook.ipynb"


def test_the_notebook_is_stored_without_what_a_run_leaves() -> None:
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None


@pytest.mark.slow
def test_the_notebook_trains_searches_and_plots(tmp_path: Path) -> None:
    """Its cells one after the other, in one namespace; the training must be of use."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    program = tmp_path / "notebook.py"
    program.write_text("\n".join([*code, 'assert found["after"] > found["before"], found']), encoding="utf-8")
    (tmp_path / "llm2vec").symlink_to(ROOT / "llm2vec")
    assert_runs("MPLBACKEND=Agg python notebook.py", tmp_path)
    assert (tmp_path / "output/notebook/figure.png").stat().st_size > 10_000
