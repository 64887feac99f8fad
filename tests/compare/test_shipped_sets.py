"""The sets of recipes that come with the project: each can be read, and its recipes differ by their ideas only."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from llm2vec.__main__ import COMMANDS
from llm2vec.compare.recipes import read_set
from llm2vec.compare.runs import Planner
from llm2vec.compare.table import own_keys
from llm2vec.model.settings import read_settings
from tests.compare.test_compare import config_of, unique_runs, write

ROOT = Path(__file__).parents[2]
SETS = ROOT / "train_configs/comparison"

#: Keys by which shipped recipes may differ: what their ideas are made of. All else is shared.
IDEAS = {
    "template", "bidirectional", "pooling_mode", "target", "alpha", "objective", "lm_weight", "examples_per_query",
    "loss_scale", "doc_max_length", "target_loss", "bottleneck", "decoder", "decoder_bos", "trainable", "projection",
    "guide", "guide_margin", "hardness_weight", "dataset_file_path", "teacher_vectors", "teacher_projection",
}  # fmt: skip
#: And those that match recipes by the tokens that their pre-stages run, in a set of its own recipes.
BUDGET = {"max_steps", "warmup_steps"}


@pytest.fixture(params=sorted(path.parent.name for path in SETS.glob("*/shared.json")))
def shipped(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Planner:
    """A shipped set, with empty stand-ins for the base and the data that lie outside the repository."""
    for name in ("train_configs", "test_configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "output/quickstart/base/model.safetensors", "")
    write(tmp_path / "cache/docstrings/train/docstrings.jsonl", "")
    (tmp_path / "cache/docstrings/eval").mkdir(parents=True)
    from llm2vec.data.sources import e5_sources

    for source in e5_sources():
        write(tmp_path / "cache/echo-data" / source.file, "")
        write(tmp_path / "cache/echo-split/train" / source.file, "")
    (tmp_path / "cache/echo-split/eval").mkdir()
    write(tmp_path / "output/smollm2/model.safetensors", "")
    for name in ("random", "mined", "margin", "rescored", "vectors"):
        write(tmp_path / "cache/negatives" / name / "squad.jsonl", "")
    write(tmp_path / "cache/negatives/split/eval/instructions.json", {})
    return Planner(read_set(Path("train_configs/comparison", request.param)), tmp_path / "out")


def test_every_shipped_recipe_can_be_read(shipped: Planner) -> None:
    """All of its configs, as its commands will read them; the commands are there."""
    for run in unique_runs(shipped.trials([42, 43])):
        assert run.command in COMMANDS


def test_the_base_is_read_as_the_baseline_begins_with_it(shipped: Planner) -> None:
    """Where a set scores the base's closing states: the settings of that row are those of the baseline's step 0."""
    trials = {trial.recipe: trial for trial in shipped.trials([42])}
    if (row := trials.get("base_last")) is None or not trials["baseline"].along:
        return
    read, begun = (
        read_settings(Path(run.arguments[run.arguments.index("--settings") + 1]))
        for run in (row.evaluation, trials["baseline"].along[0])
    )
    assert {**begun, **read} == begun and begun["pooling_mode"] == "last" and begun["attention"] == "causal"


def test_shipped_recipes_differ_by_their_ideas_only(shipped: Planner) -> None:
    is_matched = not _has_the_library(shipped.recipe_set.folder / "shared.json")
    for recipe in shipped.recipe_set.recipes:
        for stage in recipe.stages:
            # A frozen decoder beside a set that shares the weights out, and holds activations to a budget.
            is_frozen = stage.keys.get("decoder") == "frozen" and stage.keys.get("fsdp") is False
            alone = {"fsdp", "activation_memory_gb", "gradient_checkpointing"} if is_frozen else set()
            assert set(stage.keys) <= IDEAS | alone | (BUDGET if is_matched else set()), (
                f"{stage.file}: everything else is shared"
            )
            if "doc_max_length" in stage.keys:
                assert recipe.name == "echo_mean_same_tokens", "the one recipe that is about fewer tokens"
                assert stage.keys["doc_max_length"] == shipped.recipe_set.shared["all"]["doc_max_length"] // 2
    scales = {
        run.name: config_of(run)["loss_scale"]
        for t in shipped.trials([42])
        for run in t.training[-1:]
        if run.command == "stage-2"
    }
    for trial in shipped.trials([42]):
        if trial.training and trial.training[-1].name in scales:
            own = re.search(r"_tau_([\d.]+)$", trial.recipe)
            assert scales[trial.training[-1].name] == pytest.approx(1 / float(own[1]) if own else 20)


def test_a_recipe_with_another_temperature_is_otherwise_the_same() -> None:
    library = {recipe.name: recipe for recipe in read_set(SETS / "quickstart").recipes}
    for name, recipe in library.items():
        if "_tau_" in name:
            plain = library[name.partition("_tau_")[0]]
            for mine, other in zip(recipe.stages, plain.stages, strict=True):
                assert mine.stage == other.stage
                assert {key: value for key, value in mine.keys.items() if key != "loss_scale"} == other.keys


def _has_the_library(shared: Path) -> bool:
    """Whether a set compares the published recipes; else its pre-stages are matched by tokens."""
    return json.loads(shared.read_text(encoding="utf-8")).get("recipes") == "../recipes"


def test_all_sets_compare_the_same_recipes() -> None:
    trained = [
        {recipe.name for recipe in read_set(path.parent).recipes if recipe.stages}
        for path in SETS.glob("*/shared.json")
        if _has_the_library(path)
    ]
    assert len(trained) == 3 and all(names == trained[0] for names in trained)


def test_own_keys_are_listed() -> None:
    listed = own_keys(read_set(SETS / "quickstart").recipes)
    assert listed["baseline"] == "stage_II"
    assert listed["bm25"] == "scores mteb/baseline-bm25s"
    assert listed["llm2vec"] == 'mntp; then stage_II: bidirectional true, pooling_mode "mean"'


#: The names of compared methods; that of the package and of the data archive (echo-data) are not among them.
NAMES = re.compile(
    r"grit|repllama|llara|llama2vec|e5[-_ ]?mistral|\bicl\b|bge|qwen3[-_ ]emb|echo(?![-_]data|-embeddings#)"
    r"|self[-_]recon|retromae|simlm|instructor"
)
#: Where methods' templates are, and the one objective that can do with a single template.
MAY_NAME = {"templates.py", "token_set.py"}


def test_no_recipe_is_named_outside_its_template_and_objective() -> None:
    """What a run does follows from its keys. Comments may say where an idea is from; names in code may not."""
    files = sorted((ROOT / "llm2vec").rglob("*.py"))
    assert {file.name for file in files} > MAY_NAME
    for file in files:
        if file.name in MAY_NAME:
            continue
        for number, line in enumerate(code_lines(file), 1):
            named = NAMES.search(line.lower())
            assert not named, f"{file.name}, line {number}: {named and named[0]!r}"


def code_lines(file: Path) -> list[str]:
    """A module's lines without docstrings, comments and imports of other modules of the package."""
    import ast

    source = file.read_text(encoding="utf-8")
    lines = [re.sub(r"(^|\s)#.*", "", line) for line in source.splitlines()]
    for node in ast.walk(ast.parse(source)):
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if is_docstring or isinstance(node, ast.Import | ast.ImportFrom):
            for i in range(node.lineno - 1, node.end_lineno or node.lineno):
                lines[i] = ""
    return lines
