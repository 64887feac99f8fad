"""A checkpoint is whole or refused, hands everything on to the next stage, and opens no pickle."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import family_tokenizer, tiny_model
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from transformers import (
    AutoModel,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    LlamaForCausalLM,
    SiglipVisionConfig,
)

from llm2vec.evaluation.provenance import recorded_runs
from llm2vec.files import write_json
from llm2vec.llm2vec import LLM2Vec
from llm2vec.model import checkpoint
from llm2vec.model.backbone import attach_lora, load_backbone, load_tokenizer
from llm2vec.model.chain import (
    INCOMPLETE_MARKER,
    RUN_FILE,
    is_stock,
    mark_of,
    open_chain,
    open_folder,
    revision_of,
)
from llm2vec.model.checkpoint import SUMS_FILE, check_sums, environment, read_weights, save_checkpoint, write_sums
from llm2vec.model.settings import SETTINGS_FILE, EncoderSettings, row_tokenizer
from llm2vec.model.vault import MODULES_FILE
from llm2vec.text.probe_texts import probe_ids
from llm2vec.types import UserError

SETTINGS = EncoderSettings("last", 64, template="llama3", instruction_join="; ", attention="causal")


def save_stage_I(folder: Path, seed: int = 0) -> LlamaForCausalLM:
    """A Stage I folder as the script leaves it: decoder, head of its own, tokenizer, settings, probe ids."""
    model = tiny_model("llama", True, seed=seed, initializer_range=0.2, tie_word_embeddings=False)
    tokenizer = family_tokenizer("llama")
    save_checkpoint(folder, model, tokenizer, SETTINGS, {"probe_ids": probe_ids(row_tokenizer(tokenizer, SETTINGS))})
    assert isinstance(model, LlamaForCausalLM)
    return model


def save_stage_II(folder: Path, base: Path) -> None:
    """A Stage II folder: an adapter that does something, on the base."""
    model = attach_lora(load_backbone(open_chain(str(base))), r=4, alpha=8, dropout=0.0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    settings = EncoderSettings(**{**open_folder(str(base)).settings, "parent_adapters": ()})
    save_checkpoint(folder, model, family_tokenizer("llama"), settings)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    save_stage_I(folder / "stage_I")
    save_stage_II(folder / "stage_II", folder / "stage_I")
    return folder


@pytest.fixture
def stages(written: Path, tmp_path: Path) -> Path:
    """A copy of both stages' folders, to be damaged."""
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    config = tmp_path / "stage_II/adapter_config.json"
    size = config.stat().st_size
    config.write_text(config.read_text().replace(str(written), str(tmp_path)), encoding="utf-8")
    assert len(str(written)) != len(str(tmp_path)) or config.stat().st_size == size
    run = json.loads((tmp_path / "stage_II" / RUN_FILE).read_text())
    run["files"]["adapter_config.json"] = config.stat().st_size
    write_json(tmp_path / "stage_II" / RUN_FILE, run)
    return tmp_path


def load(stages: Path, *adapters: str) -> torch.Tensor:
    model = LLM2Vec.from_pretrained(str(stages / "stage_I"), [str(stages / name) for name in adapters])
    vectors = model.encode(["who wrote it", "hello world"], show_progress_bar=False, device="cpu")
    assert isinstance(vectors, torch.Tensor)
    return vectors


def bare(folder: Path, keep: tuple[str, ...] = ()) -> Path:
    """A folder as somebody else writes it: without our files but those kept."""
    for name in (RUN_FILE, SETTINGS_FILE):
        if name not in keep:
            (folder / name).unlink()
    return folder


# --- what is written ---


def test_what_a_folder_holds(written: Path) -> None:
    """Weights, tokenizer, settings and provenance with every file's size; nothing is left over from writing."""
    names = {file.name for file in (written / "stage_I").iterdir()}
    expected = {"model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", SETTINGS_FILE, RUN_FILE}
    assert expected <= names
    assert {file.name for file in (written / "stage_II").iterdir()} >= {"adapter_model.safetensors", SETTINGS_FILE}
    assert not [name for name in names if name.startswith(".")]
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl"))]
    run = json.loads((written / "stage_I" / RUN_FILE).read_text(encoding="utf-8"))
    assert set(run["files"]) == names - {RUN_FILE}
    assert all(size == (written / "stage_I" / name).stat().st_size for name, size in run["files"].items())
    assert {"python", "torch", "transformers", "peft"} <= set(run["versions"])
    assert "git_commit" in run
    assert open_folder(str(written / "stage_I")).run == run


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_is_that_of_this_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not that of a project in which somebody has installed it."""
    file = tmp_path / ".venv/site-packages/llm2vec/model/checkpoint.py"
    file.parent.mkdir(parents=True)
    file.touch()
    monkeypatch.setattr(checkpoint, "__file__", str(file))

    def git(*words: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        return subprocess.run(
            ["git", "-C", str(tmp_path), *who, *words], check=True, capture_output=True, text=True
        ).stdout.strip()

    git("init")
    git("commit", "--allow-empty", "-m", "of the project")
    assert environment()["git_commit"] is None
    git("add", ".")
    git("commit", "-m", "with the code")
    assert environment()["git_commit"] == git("rev-parse", "HEAD")


def test_sentence_transformers_stops_at_a_checkpoint_with_a_sentence(stages: Path) -> None:
    """It would write no template, close no text and pool at will. All that is ours takes the folder for what it is."""
    for stage in ("stage_I", "stage_II"):
        folder = stages / stage
        with pytest.raises(ImportError, match="this is a checkpoint of llm2vec: make one of it by `llm2vec export`"):
            SentenceTransformer(str(folder))
        assert not is_stock(str(folder))
        without = shutil.copytree(folder, stages / f"{stage}-without")
        (without / MODULES_FILE).unlink()
        assert revision_of(str(without)) == revision_of(str(folder))  # so kept scores are found again
    model = LLM2Vec.from_pretrained(stages / "stage_I")
    model.save(stages / "as_upstream", save_config=False)  # asks for a folder without anything of ours
    assert not (stages / "as_upstream" / MODULES_FILE).exists()


def test_settings_are_read_as_written(written: Path) -> None:
    assert EncoderSettings(**open_folder(str(written / "stage_I")).settings) == SETTINGS


def test_weights_of_another_kind_do_not_stay(stages: Path) -> None:
    """An adapter, a full model and one in shards, each over the one before: what is loaded is the last."""
    folder = stages / "stage_II"
    fresh = LLM2Vec.from_pretrained(str(folder))
    texts = ["who wrote it", "hello world"]
    expected = fresh.encode(texts, show_progress_bar=False)
    base = stages / "stage_I"
    for save in (
        lambda: save_stage_I(folder, seed=1),
        lambda: save_stage_II(folder, base),
        lambda: tiny_model("llama").save_pretrained(folder, max_shard_size="20KB"),
    ):
        save()
        assert len(list(folder.glob("*model*.safetensors"))) > 0
    assert len(list(folder.glob("model-*.safetensors"))) > 1 and (folder / "model.safetensors.index.json").is_file()
    fresh.save(folder, merge_before_save=True)
    kept = {file.name for file in folder.iterdir() if "model" in file.name or "adapter" in file.name}
    assert kept == {"model.safetensors"}
    assert open_chain(str(folder)).folders == (open_folder(str(folder)),)
    again = LLM2Vec.from_pretrained(str(folder)).encode(texts, show_progress_bar=False)
    assert torch.allclose(torch.as_tensor(again), torch.as_tensor(expected), atol=1e-5)
    save_stage_II(folder, base)
    assert not list(folder.glob("model*.safetensors")) and (folder / "adapter_model.safetensors").is_file()


def test_an_adapter_does_not_take_its_base_away(stages: Path) -> None:
    """Written into the base's own folder, it lies beside the weights that it needs; which of both is meant is open."""
    before = load_file(stages / "stage_I/model.safetensors")
    save_stage_II(stages / "stage_I", stages / "stage_I")
    after = load_file(stages / "stage_I/model.safetensors")
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    with pytest.raises(UserError, match="stage_I: an adapter cannot be its own base; put the two into folders"):
        open_chain(str(stages / "stage_I"))


# --- cut short ---


def test_writing_cut_short_over_an_older_checkpoint_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some files are new and some are old, all of a plausible size: the marker tells."""
    save_stage_I(tmp_path, seed=0)
    old = load_file(tmp_path / "model.safetensors")
    replace, moved = Path.replace, []

    def interrupted(self: Path, target: Path) -> Path:
        if Path(target).parent == tmp_path:
            if len(moved) == 3:
                raise KeyboardInterrupt
            moved.append(Path(target).name)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_stage_I(tmp_path, seed=1)
    monkeypatch.undo()
    assert len(moved) == 3
    assert not torch.equal(tiny_model("llama", True, seed=1).lm_head.weight, old["lm_head.weight"])
    with pytest.raises(UserError, match="cut short while it was written"):
        LLM2Vec.from_pretrained(str(tmp_path))
    save_stage_I(tmp_path, seed=1)  # writing it again mends it
    LLM2Vec.from_pretrained(str(tmp_path))


def test_a_failure_before_the_first_file_leaves_the_older_checkpoint(
    stages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights are written aside: a full disk in the middle of them costs nothing."""
    before = load(stages)

    def full_disk(self: Any, folder: str, **_: Any) -> None:
        Path(folder, "model.safetensors").write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_stage_I(stages / "stage_I", seed=1)
    assert torch.equal(load(stages), before)
    assert not [file.name for file in (stages / "stage_I").iterdir() if file.name.startswith(".")]


@pytest.mark.parametrize("damaged", ["stage_I", "stage_II"])
@pytest.mark.parametrize("how", ["marker", "truncated", "missing", "missing_tokenizer", "missing_settings"])
def test_a_damaged_folder_is_refused_by_name(stages: Path, damaged: str, how: str) -> None:
    """As the base alone, as the base below an adapter, and as the adapter."""
    load(stages, "stage_II")
    weights = "model.safetensors" if damaged == "stage_I" else "adapter_model.safetensors"
    file = (
        stages / damaged / {"missing_tokenizer": "tokenizer.json", "missing_settings": SETTINGS_FILE}.get(how, weights)
    )
    size = file.stat().st_size
    if how == "marker":
        (stages / damaged / INCOMPLETE_MARKER).touch()
        words = [str(stages / damaged), "cut short while it was written"]
    elif how == "truncated":
        file.write_bytes(file.read_bytes()[: size // 2])
        words = [str(stages / damaged), f"{weights} is {size // 2} bytes long instead of {size}"]
    else:
        file.unlink()
        words = [str(stages / damaged), f"{file.name} is missing"]
    for adapters in ([], ["stage_II"]) if damaged == "stage_I" else (["stage_II"],):
        with pytest.raises(UserError) as error:
            load(stages, *adapters)
        assert all(word in str(error.value) for word in words), str(error.value)
    with pytest.raises(UserError):
        open_folder(str(stages / damaged))


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_truncated_weights_are_refused_without_our_record_too(stages: Path, share: float) -> None:
    folder = bare(stages / "stage_I")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: int(share * weights.stat().st_size)])
    with pytest.raises(UserError, match="could not be loaded") as error:
        LLM2Vec.from_pretrained(str(folder))
    assert str(folder) in str(error.value)


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_a_damaged_adapter_config_is_named(stages: Path, content: str) -> None:
    (stages / "stage_II" / RUN_FILE).unlink()
    (stages / "stage_II/adapter_config.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=r"stage_II: its adapter_config\.json cannot be read \("):
        open_chain(str(stages / "stage_II"))


@pytest.mark.parametrize(
    ("key", "value", "needed"),
    [("files", [1], "an object"), ("parent", "base", "an object"), ("parent_weights", {}, "a list"),
     ("config", 3, "an object")],
)  # fmt: skip
def test_a_record_of_another_form_is_named(stages: Path, key: str, value: Any, needed: str) -> None:
    file = stages / "stage_II" / RUN_FILE
    write_json(file, json.loads(file.read_text(encoding="utf-8")) | {key: value})
    with pytest.raises(UserError) as refused:
        open_chain(str(stages / "stage_II"))
    assert str(refused.value) == f"{file}: {key} is {value!r}; {needed} is needed."


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    for path in (str(tmp_path / "nowhere"), "nobody/nothing-at-all"):
        with pytest.raises(UserError) as error:
            LLM2Vec.from_pretrained(path)
        assert path in str(error.value)
        assert "Repo id must be" not in str(error.value)  # that is about the hub, and a folder was meant


# --- hand-over ---


def test_a_model_of_more_than_text_is_refused_and_its_text_model_is_taken(tmp_path: Path) -> None:
    """In one sentence that names the folder, for training too; and what the sentence says to do, does."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokenizer = family_tokenizer("gemma")
    text = Gemma3TextConfig(**shape, vocab_size=len(tokenizer), num_key_value_heads=2, head_dim=8)
    seen = SiglipVisionConfig(**shape, image_size=28, patch_size=14)
    both = Gemma3Config(text_config=text.to_dict(), vision_config=seen.to_dict(), mm_tokens_per_image=4)
    Gemma3ForConditionalGeneration(both).save_pretrained(tmp_path / "both")
    AutoModel.from_pretrained(tmp_path / "both").language_model.save_pretrained(tmp_path / "text")
    for folder in ("both", "text"):
        tokenizer.save_pretrained(tmp_path / folder)
    for load in (LLM2Vec.from_pretrained, lambda path: load_backbone(open_chain(path), with_lm_head=True)):
        with pytest.raises(UserError, match="both' holds more than a text model") as refused:
            load(str(tmp_path / "both"))
        assert "language_model.save_pretrained" in str(refused.value)
    vectors = LLM2Vec.from_pretrained(tmp_path / "text").encode(["hello"], show_progress_bar=False)
    assert vectors.shape == (1, 32)


def test_stage_I_keeps_the_head_and_stage_II_leaves_it(
    stages: Path, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    """Every tensor is saved to the bit; Stage II takes the decoder without a word about the head."""
    trained = tiny_model("llama", True, initializer_range=0.2, tie_word_embeddings=False).state_dict()
    saved = load_file(stages / "stage_I/model.safetensors")
    assert "lm_head.weight" in saved and saved.keys() == trained.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in trained.items())
    with caplog.at_level(logging.WARNING):
        decoder = load_backbone(open_chain(str(stages / "stage_I"))).state_dict()
    assert not caplog.records
    assert not list(recwarn)
    assert {f"model.{name}" for name in decoder} == trained.keys() - {"lm_head.weight"}
    assert all(torch.equal(tensor, trained[f"model.{name}"]) for name, tensor in decoder.items())
    whole = load_backbone(open_chain(str(stages / "stage_I")), with_lm_head=True).state_dict()
    assert torch.equal(whole["lm_head.weight"], trained["lm_head.weight"])


def test_a_tied_head_stays_tied(tmp_path: Path) -> None:
    model = tiny_model("llama", True, initializer_range=0.2, tie_word_embeddings=True)
    save_checkpoint(tmp_path, model, family_tokenizer("llama"), SETTINGS)
    loaded = load_backbone(open_chain(str(tmp_path)), with_lm_head=True)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert torch.equal(loaded.get_input_embeddings().weight, model.get_input_embeddings().weight)


def test_adapters_go_onto_the_decoder_of_a_model_with_a_head(stages: Path) -> None:
    """Stage I from a base with an adapter: merged into the decoder, and the head stays."""
    chain = open_chain(str(stages / "stage_II"))
    assert (chain.base, chain.adapters) == (str(stages / "stage_I"), (str(stages / "stage_II"),))
    with_head = load_backbone(chain, with_lm_head=True)
    without = load_backbone(chain)
    plain = load_backbone(open_chain(chain.base), with_lm_head=True)
    assert isinstance(with_head, LlamaForCausalLM)
    states = with_head.model.state_dict()
    assert states.keys() == without.state_dict().keys()
    assert all(torch.equal(states[name], tensor) for name, tensor in without.state_dict().items())
    merged = with_head.model.layers[0].mlp.up_proj.weight
    assert not torch.equal(merged, plain.model.layers[0].mlp.up_proj.weight)
    assert torch.equal(with_head.lm_head.weight, plain.lm_head.weight)


def test_saving_a_loaded_model_keeps_the_record_of_its_training(stages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that mteb is told the training data: as an adapter, merged before or after loading, and saved again."""
    for name in ("stage_I", "stage_II"):
        data = [{"source": f"of {name}", "rows": 3, "file": "/home/jane/x.jsonl"}]
        trained = {"config": {"stage": name}, "data": data, "versions": {"torch": "2.0"}, "git_commit": "abc"}
        write_json(stages / name / RUN_FILE, json.loads((stages / name / RUN_FILE).read_text("utf-8")) | trained)

    def runs(name: str) -> list[Any]:
        return [run.record for run in recorded_runs(open_chain(str(stages / name)).folders)]

    expected = runs("stage_II")
    assert [run["config"]["stage"] for run in expected] == ["stage_I", "stage_II"] and expected[0]["git_commit"]
    model = LLM2Vec.from_pretrained(stages / "stage_II")
    model.save(stages / "again")
    pushed: list[dict[str, Any]] = []
    keep = lambda folder, *_: pushed.append(json.loads((folder / RUN_FILE).read_text("utf-8")))  # noqa: E731
    monkeypatch.setattr("llm2vec.llm2vec.upload", keep)
    model.push_to_hub("me/mine")
    assert pushed[0]["probe_ids"] and not {"config", "data", "stages"} & pushed[0].keys()  # which name local paths
    model.save(stages / "merged", merge_before_save=True)
    LLM2Vec.from_pretrained(stages / "stage_II", merge_peft=True).save(stages / "merged_at_load")
    LLM2Vec.from_pretrained(stages / "merged").save(stages / "merged_again")
    for name in ("again", "merged", "merged_at_load", "merged_again"):
        LLM2Vec.from_pretrained(stages / name)
        assert runs(name) == expected, name
    own = LLM2Vec.from_pretrained(stages / "stage_I")
    own.model = attach_lora(own.model, r=4, alpha=8, dropout=0.0)  # type: ignore[arg-type]
    own.save(stages / "own")
    assert "config" not in json.loads((stages / "own" / RUN_FILE).read_text("utf-8"))  # that run made what is below it


# --- chains of adapters ---


@pytest.fixture
def siblings(stages: Path) -> Path:
    """Two adapters on the base beside `stage_II`, and one that was trained on top of `first`."""
    for seed, name in enumerate(("first", "second")):
        torch.manual_seed(seed)
        save_stage_II(stages / name, stages / "stage_I")
    torch.manual_seed(2)
    below = (str(stages / "first"),)
    model = attach_lora(load_backbone(open_chain(str(stages / "stage_I"), below)), r=4, alpha=8, dropout=0.0)
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.3)
    settings = EncoderSettings(**{**open_folder(str(stages / "stage_I")).settings, "parent_adapters": below})
    save_checkpoint(stages / "outer", model, family_tokenizer("llama"), settings)
    return stages


def forget_weights(folder: Path) -> None:
    """As a checkpoint that recorded where its parents lay and no more."""
    run = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    del run["parent_weights"]
    write_json(folder / RUN_FILE, run)


@pytest.mark.parametrize(
    ("adapters", "named"),
    [(["second", "outer"], "outer"), (["outer"], "outer"), (["outer", "first"], "outer"),
     (["second", "first", "outer"], "first")],
)  # fmt: skip
@pytest.mark.parametrize("recorded", [True, False], ids=["by_weights", "by_name"])
def test_an_adapter_on_others_than_it_was_trained_on_is_refused(
    siblings: Path, adapters: list[str], named: str, recorded: bool
) -> None:
    """Another one in its place, none, the wrong order, one too many: all are named."""
    load(siblings, "first", "outer")
    if not recorded:
        forget_weights(siblings / "outer")
        load(siblings, "first", "outer")
    with pytest.raises(UserError, match="was trained on top of") as error:
        load(siblings, *adapters)
    assert f"{siblings / named} was trained" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_moved_adapter_is_known_by_its_weights_or_its_name(siblings: Path) -> None:
    """Renamed too, where the weights are recorded; and another one under the same name is told from it."""
    expected = load(siblings, "first", "outer")
    (siblings / "away").mkdir()
    (siblings / "first").rename(siblings / "away/renamed")
    assert torch.equal(load(siblings, "away/renamed", "outer"), expected)
    (siblings / "second").rename(siblings / "first")
    with pytest.raises(UserError, match="was trained on top of"):
        load(siblings, "first", "outer")
    forget_weights(siblings / "outer")
    with pytest.raises(UserError, match="was trained on top of"):
        load(siblings, "away/renamed", "outer")
    (siblings / "away/renamed").rename(siblings / "away/first")
    assert torch.equal(load(siblings, "away/first", "outer"), expected)


def test_another_base_than_it_was_trained_on_is_said(stages: Path, caplog: pytest.LogCaptureFixture) -> None:
    """In one sentence with both names; a copy of the true one is not another."""
    base, adapter = str(stages / "stage_I"), stages / "stage_II"
    run = json.loads((adapter / RUN_FILE).read_text(encoding="utf-8"))
    write_json(adapter / RUN_FILE, run | {"parent": {"model_name_or_path": base, "marks": {base: mark_of(base)}}})
    shutil.copytree(base, stages / "copy")
    open_chain(str(stages / "copy"), [str(adapter)])
    open_chain("nobody/nothing", [str(adapter)])  # a hub's name and a folder cannot be told apart
    assert not caplog.records
    other = tiny_model("llama", True, initializer_range=0.3)
    save_checkpoint(stages / "other", other, family_tokenizer("llama"), SETTINGS)
    open_chain(str(stages / "other"), [str(adapter)])
    (record,) = caplog.records
    assert f"stage_II was trained on {base}, and {stages / 'other'} is not the same" in record.getMessage()


def test_parents_moved_during_training_do_not_cost_the_checkpoint(siblings: Path) -> None:
    """Their weights are then not recorded, and their names still are."""
    settings = EncoderSettings(**{**open_folder(str(siblings / "outer")).settings, "parent_adapters": ("/gone/first",)})
    model = load_backbone(open_chain(str(siblings / "stage_I"), (str(siblings / "second"),)), merge_last=False)
    save_checkpoint(siblings / "again", model, family_tokenizer("llama"), settings)
    load(siblings, "first", "again")
    with pytest.raises(UserError, match="was trained on top of /gone/first"):
        load(siblings, "second", "again")


# --- the tokenizer ---


def swap_two_letters(folder: Path) -> None:
    """Another vocabulary in a file of the same size."""
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    vocabulary["q"], vocabulary["w"] = vocabulary["w"], vocabulary["q"]
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")


def test_a_changed_tokenizer_is_refused(stages: Path) -> None:
    load(stages)
    size = (stages / "stage_I/tokenizer.json").stat().st_size
    swap_two_letters(stages / "stage_I")
    assert (stages / "stage_I/tokenizer.json").stat().st_size == size  # so its size does not give it away
    with pytest.raises(UserError, match="renders the checkpoint's probe texts to other token ids") as error:
        load(stages)
    assert str(stages / "stage_I") in str(error.value)


def test_a_tokenizer_with_several_chat_templates_is_handed_on(tmp_path: Path) -> None:
    """transformers would write all but the first into a folder of their own; saved twice, summed up, and opened."""
    tokenizer = family_tokenizer("llama")
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": "{{ tools }}"}
    for _ in range(2):
        save_checkpoint(tmp_path, tiny_model("llama"), tokenizer, SETTINGS)
    write_sums(tmp_path)
    check_sums(tmp_path)
    assert load_tokenizer(open_folder(str(tmp_path))).chat_template == tokenizer.chat_template
    LLM2Vec.from_pretrained(tmp_path).save(tmp_path / "again")
    assert load_tokenizer(open_folder(str(tmp_path / "again"))).chat_template == tokenizer.chat_template


# --- llm2vec_config.json ---


def test_upstreams_own_settings_file_loads(stages: Path) -> None:
    """The four keys that upstream LLM2Vec writes; such a model is pooled as upstream pools it."""
    folder = bare(stages / "stage_I")
    upstream = {"pooling_mode": "mean", "max_length": 512, "doc_max_length": 400, "skip_instruction": True}
    (folder / SETTINGS_FILE).write_text(json.dumps(upstream), encoding="utf-8")
    model = LLM2Vec.from_pretrained(str(folder))
    expected = EncoderSettings("mean", 512, 400, True, "llama3", " ", "bidirectional", instruction_mask="counted")
    assert model.settings == expected
    upstream["pooling_mode"] = "eos_token"
    (folder / SETTINGS_FILE).write_text(json.dumps(upstream), encoding="utf-8")
    assert LLM2Vec.from_pretrained(str(folder)).settings.pooling_mode == "last"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("poling_mode", "mean"),
        ("pooling_mode", "middle"),
        ("pooling_mode", ["mean"]),
        ("attention", "sideways"),
        ("max_length", 0),
        ("max_length", "512"),
        ("doc_max_length", 2.5),
        ("skip_instruction", "false"),
        ("normalize", "no"),
        ("template", "llama-3"),
        ("template", 3),
        ("instruction_join", None),
    ],
    ids=str,
)
def test_a_wrong_setting_is_named(stages: Path, key: str, value: Any) -> None:
    """File, key and value are named, and what is allowed or needed."""
    folder = bare(stages / "stage_I")
    (folder / SETTINGS_FILE).write_text(json.dumps({key: value}), encoding="utf-8")
    with pytest.raises(UserError) as error:
        LLM2Vec.from_pretrained(str(folder))
    assert str(error.value).startswith(str(folder / SETTINGS_FILE)) and key in str(error.value)
    assert key == "poling_mode" or repr(value) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["", "{", "[]", '"mean"', "null"])
def test_a_settings_file_that_is_no_object_is_named(stages: Path, content: str) -> None:
    folder = bare(stages / "stage_I")
    (folder / SETTINGS_FILE).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=SETTINGS_FILE):
        LLM2Vec.from_pretrained(str(folder))


def test_a_setting_changed_by_hand_is_not_called_cut_short(stages: Path) -> None:
    """Whoever edits the file hears that it was changed, and may believe it."""
    file = stages / "stage_I" / SETTINGS_FILE
    file.write_text(file.read_text(encoding="utf-8").replace('"max_length": 64', '"max_length": 128'), encoding="utf-8")
    with pytest.raises(UserError) as error:
        load(stages)
    assert "changed" in str(error.value).replace(str(stages), "")
    assert SETTINGS_FILE in str(error.value)


# --- pickles ---


def forbid_pickles(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    opened: list[Any] = []
    real: Callable[..., Any] = torch.load

    def watched(*arguments: Any, **keywords: Any) -> Any:
        opened.append(arguments)
        return real(*arguments, **keywords)

    monkeypatch.setattr(torch, "load", watched)
    return opened


def test_a_base_that_is_a_pickle_is_not_opened(stages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = bare(stages / "stage_I")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    opened = forbid_pickles(monkeypatch)
    with pytest.raises(UserError, match="safetensors"):
        LLM2Vec.from_pretrained(str(folder))
    assert not opened


def test_an_adapter_that_is_a_pickle_is_not_opened(stages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = bare(stages / "stage_II", keep=(SETTINGS_FILE,))
    weights = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(weights, folder / "adapter_model.bin")
    opened = forbid_pickles(monkeypatch)
    with pytest.raises(UserError, match="safetensors"):
        load(stages, "stage_II")
    assert not opened


# --- going on from a checkpoint ---


def changed(model: Any) -> Any:
    """The same model with other weights."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    return model


def state_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in other)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_weights_come_back_to_the_bit(family: str, dtype: torch.dtype, tied: bool, tmp_path: Path) -> None:
    """Tied ones as one tensor."""
    model = changed(tiny_model(family, True, dtype, tie_word_embeddings=tied))
    save_checkpoint(tmp_path, model, family_tokenizer(family), None)
    before = state_of(model)
    assert not same(before, state_of(changed(model)))
    read_weights(tmp_path, model)
    assert same(before, state_of(model))
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied


@pytest.mark.parametrize("new_tokens", [(), (3, 5)])
def test_an_adapters_weights_come_back_to_the_bit(new_tokens: tuple[int, ...], tmp_path: Path) -> None:
    """With the embeddings of added tokens; the base is left alone."""
    model = attach_lora(tiny_model("llama"), r=4, alpha=8, dropout=0.0, new_tokens=new_tokens)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for parameter in trained.values():
            parameter.normal_()
    save_checkpoint(tmp_path, model, family_tokenizer("llama"), None)
    before = state_of(model)
    with torch.no_grad():
        for parameter in trained.values():
            parameter.zero_()
    read_weights(tmp_path, model)
    assert same(before, state_of(model))
    assert any("trainable_tokens" in name for name in trained) == bool(new_tokens)


@pytest.mark.parametrize("other", ["a layer less", "wider", "another type", "no head", "an adapter"])
def test_weights_of_another_model_are_refused(other: str, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, tiny_model("llama", True), family_tokenizer("llama"), None)
    model: Any = {
        "a layer less": lambda: tiny_model("llama", True, num_hidden_layers=1),
        "wider": lambda: tiny_model("llama", True, intermediate_size=96),
        "another type": lambda: tiny_model("llama", True, torch.bfloat16),
        "no head": lambda: tiny_model("llama"),
        "an adapter": lambda: attach_lora(tiny_model("llama"), r=4, alpha=8, dropout=0.0),
    }[other]()
    if other == "an adapter":
        save_checkpoint(tmp_path, attach_lora(tiny_model("llama"), r=4, alpha=8, dropout=0.0, modules=["q_proj"]),
                        family_tokenizer("llama"), None)  # fmt: skip
    with pytest.raises(UserError, match=r"the weights are not those of this model; \S+ differs"):
        read_weights(tmp_path, model)


def test_gathered_weights_are_written_as_they_are(tmp_path: Path) -> None:
    """What FSDP gathered, not what the model holds; tied weights as one tensor. The caller's are left alone."""
    model = tiny_model("llama", True, tie_word_embeddings=True)
    state = {name: tensor + 1 for name, tensor in state_of(model).items()}
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    names = set(state)
    save_checkpoint(tmp_path, model, family_tokenizer("llama"), None, state=state)
    written = load_file(tmp_path / "model.safetensors")
    assert set(state) == names and written.keys() == names - {"lm_head.weight"}
    assert all(torch.equal(tensor, state[name]) for name, tensor in written.items())


def test_sums_tell_every_change(tmp_path: Path) -> None:
    """A file more or less, other content, a line of the sums gone; hidden files do not count."""
    (tmp_path / "a").write_text("one", encoding="utf-8")
    (tmp_path / "b").write_text("two", encoding="utf-8")
    (tmp_path / ".nfs0001").write_text("of a network disk", encoding="utf-8")
    write_sums(tmp_path)
    (tmp_path / ".nfs0001").unlink()
    (tmp_path / ".DS_Store").touch()
    check_sums(tmp_path)
    sums = (tmp_path / SUMS_FILE).read_text(encoding="utf-8")
    for file, content, message in [
        ("a", "six", "a is not what was written"),
        ("c", "", f"c is not in {SUMS_FILE}"),
        (SUMS_FILE, sums[: sums.index("\n") + 1], f"b is not in {SUMS_FILE}"),
        (SUMS_FILE, sums[:40], "is missing"),
    ]:
        old = (tmp_path / file).read_text(encoding="utf-8") if (tmp_path / file).exists() else None
        (tmp_path / file).write_text(content, encoding="utf-8")
        with pytest.raises(UserError, match=message):
            check_sums(tmp_path)
        (tmp_path / file).unlink() if old is None else (tmp_path / file).write_text(old, encoding="utf-8")
    (tmp_path / "b").unlink()
    with pytest.raises(UserError, match="b is missing"):
        check_sums(tmp_path)


def test_what_a_killed_save_left_is_removed_by_the_next(tmp_path: Path) -> None:
    abandoned = tmp_path / ".writing-abc"
    abandoned.mkdir()
    (abandoned / "model.safetensors").touch()
    save_checkpoint(tmp_path, tiny_model("llama"), family_tokenizer("llama"), None)
    assert not list(tmp_path.glob(".writing-*"))
