"""A folder is opened once, whoever asks; the hashes that tell models apart are those of older records."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from helpers import family_tokenizer, tiny_model

import llm2vec
from llm2vec.choice import ModelChoice
from llm2vec.files import data_revision, json_hash
from llm2vec.llm2vec import LLM2Vec
from llm2vec.model.backbone import attach_lora
from llm2vec.model.chain import RUN_FILE, adapter_hash, is_mark_of_folder, mark_of, open_chain, open_folder, revision_of
from llm2vec.model.checkpoint import save_checkpoint
from llm2vec.model.settings import SETTINGS_FILE, EncoderSettings, row_tokenizer
from llm2vec.probes.reconstruction import load_reconstructor
from llm2vec.text.probe_texts import probe_ids
from llm2vec.training.config import Config
from llm2vec.training.model import load_model
from llm2vec.types import UserError

SETTINGS = EncoderSettings("last", 64, template="llama3", instruction_join="; ", attention="bidirectional")
PACKAGE = str(Path(llm2vec.__file__).parent) + os.sep

#: Names of the files opened while `opened_files` watches; a hook cannot be taken away again.
_opened: list[str] | None = None


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if _opened is not None and event == "open" and isinstance(arguments[0], str):
        _opened.append(arguments[0])


sys.addaudithook(_note)


@contextmanager
def opened_files() -> Iterator[Counter[str]]:
    """How often each file is opened meanwhile, filled in at the end."""
    global _opened
    _opened, counts = [], Counter[str]()
    try:
        yield counts
    finally:
        counts.update(_opened)
        _opened = None


@contextmanager
def moves() -> Iterator[list[tuple[str, str]]]:
    """Each call that leads into another module of the package: the module, and the function."""
    entered: list[tuple[str, str]] = []
    here, before = "", []

    def watch(frame: FrameType, event: str, _: Any) -> None:
        nonlocal here
        file = frame.f_code.co_filename
        if not file.startswith(PACKAGE) or event not in ("call", "return"):
            return
        if event == "return":
            here = before.pop() if before else ""
            return
        before.append(here)
        module = file.removeprefix(PACKAGE).removesuffix(".py").replace(os.sep, ".")
        if module != here:
            entered.append((module, frame.f_code.co_name))
        here = module

    sys.setprofile(watch)
    try:
        yield entered
    finally:
        sys.setprofile(None)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base as Stage I leaves it, an adapter on it, and one without any file of ours."""
    root = tmp_path_factory.mktemp("chain")
    tokenizer = family_tokenizer("llama")
    run = {"probe_ids": probe_ids(row_tokenizer(tokenizer, SETTINGS)), "config": {}}
    save_checkpoint(root / "base", tiny_model("llama", True), tokenizer, SETTINGS, run)
    for name in ("adapter", "foreign"):
        model = attach_lora(tiny_model("llama"), r=4, alpha=8, dropout=0.0)
        model.active_peft_config.base_model_name_or_path = str(root / "base")
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
        settings = dataclasses.replace(SETTINGS, normalize=True, parent_adapters=())
        save_checkpoint(root / name, model, tokenizer, settings, run)
    for file in (RUN_FILE, SETTINGS_FILE, "tokenizer_config.json", "tokenizer.json"):
        (root / "foreign" / file).unlink()
    return root


LOADERS: dict[str, Callable[[Path], Any]] = {
    "from_pretrained": lambda root: LLM2Vec.from_pretrained(root / "base", root / "adapter"),
    "from_pretrained, adapter alone": lambda root: LLM2Vec.from_pretrained(root / "adapter"),
    "choice": lambda root: ModelChoice(str(root / "base"), (str(root / "adapter"),)).load(),
    "training": lambda root: load_model(
        Config(str(root / "base"), peft_model_name_or_path=str(root / "adapter")),
        torch.device("cpu"),
        with_lm_head=True,
    ),
    "reconstruction": lambda root: load_reconstructor(ModelChoice(str(root / "adapter")), device="cpu"),
}


@pytest.mark.parametrize("how", LOADERS)
def test_each_file_of_ours_is_read_once(how: str, folders: Path) -> None:
    """Also where the base is found through the adapter; its settings are not needed where the adapter has some."""
    with opened_files() as counts:
        LOADERS[how](folders)
    assert {name: counts[str(folders / "adapter" / name)] for name in (RUN_FILE, SETTINGS_FILE)} == {
        RUN_FILE: 1,
        SETTINGS_FILE: 1,
    }
    assert counts[str(folders / "base" / RUN_FILE)] == 1
    assert counts[str(folders / "base" / SETTINGS_FILE)] == 0


def test_loading_for_training_goes_a_short_way(folders: Path) -> None:
    """A base with a fresh adapter on it: 45 moves over 11 rooms when each asked the folder again."""
    config = Config(str(folders / "base"), pooling_mode="last", use_peft=True, lora_r=4)
    with moves() as way:
        load_model(config, torch.device("cpu"), with_lm_head=False)
    names = [name for _, name in way]
    opening = way[1 : names.index("load_backbone")]
    assert len(opening) <= 20 and len({module for module, _ in opening}) <= 8, opening
    assert len(way) - 1 <= 34, way  # the vault's look at the weights and the proofs of the loaded model among them
    assert names.count("open_chain") == 1 and not {"find_file", "local_folder", "open_folder"} & set(names)


def test_settings_are_those_of_the_outermost_folder_that_has_some(folders: Path) -> None:
    """However the chain is named; so are the tokenizer's files."""
    base, adapter, foreign = (str(folders / name) for name in ("base", "adapter", "foreign"))
    for chain in (open_chain(base, [adapter]), open_chain(adapter)):
        assert (chain.base, chain.adapters) == (base, (adapter,))
        assert chain.settings["normalize"] is True and chain.tokenizer_folder.path == adapter
        assert chain.outermost.path == adapter
    for chain in (open_chain(base, [foreign]), open_chain(foreign)):
        assert chain.settings["normalize"] is False and chain.tokenizer_folder.path == base
        assert chain.outermost.path == foreign and not chain.outermost.settings
    assert LLM2Vec.from_pretrained(foreign, merge_peft=True).settings == SETTINGS


def test_an_opened_chain_is_loaded_as_it_is(folders: Path) -> None:
    chain = open_chain(str(folders / "base"), [str(folders / "adapter")])
    texts = ["who wrote it", "hello world"]
    expected = LLM2Vec.from_pretrained(folders / "base", folders / "adapter").encode(texts, show_progress_bar=False)
    with opened_files() as counts:
        model = LLM2Vec.from_pretrained(chain)
    assert counts[str(folders / "adapter" / RUN_FILE)] == 0
    assert torch.equal(torch.as_tensor(model.encode(texts, show_progress_bar=False)), torch.as_tensor(expected))
    with pytest.raises(UserError, match="adapters are part of the chain"):
        LLM2Vec.from_pretrained(chain, folders / "adapter")


def test_a_name_on_the_hub_is_asked_of_the_hub() -> None:
    """Offline, nothing is found; a path that can be no name says so."""
    folder = open_folder("nobody/nothing")
    assert folder.run == {} and folder.settings == {} and folder.find("config.json") is None
    with pytest.raises(UserError, match="'output/stage_I/x' is neither a folder nor the name of a repository"):
        open_folder("output/stage_I/x").find("config.json")


# --- hashes ---


@pytest.fixture
def known(tmp_path: Path) -> Path:
    """Folders of known bytes: one of ours, an adapter, a sentence-transformers model."""
    files = {
        "ours/config.json": b'{"a": 1}', "ours/tokenizer_config.json": b"{}", "ours/tokenizer.json": b"[1]",
        "ours/llm2vec_config.json": b'{"max_length": 8}', "ours/run.json": b'{"date": 1}',
        "ours/model.safetensors": bytes(range(256)) * 5000, "ours/notes.txt": b"no part of it",
        "adapter/adapter_config.json": b"{}", "adapter/adapter_model.safetensors": b"weights",
        "modules/modules.json": b"[]", "modules/1_Pooling/config.json": b"{}",
        "modules/model.safetensors": b"weights", "modules/vocab.txt": b"a",
    }  # fmt: skip
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    return tmp_path


def test_hashes_are_those_of_older_records(known: Path) -> None:
    """They stand in runs' `run.json` and name results: another way to take them would disown all of these."""
    paths = [str(known / name) for name in ("ours", "adapter", "modules")]
    assert [mark_of(path) for path in paths] == ["2d046e51d461d2d6", "d835d1b4e9d37668", "a1d6f019b6f69bab"]
    assert [revision_of(path) for path in paths] == ["b8e5bd01f15249af", "d835d1b4e9d37668", "5ee77e1924de3e55"]
    weights = "9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c"
    assert [adapter_hash(path) for path in paths] == [None, weights, None]
    assert data_revision(known / "ours") == "local-335ed30d5966bfd2"
    assert json_hash({"b": [1, None], "a": "ü"}) == "424e2bdf70298011"


def test_a_mark_follows_what_it_reads(known: Path) -> None:
    """Small files whole; of the weights the size and the end; nothing of `run.json`."""
    folder = known / "ours"
    mark = mark_of(str(folder))
    assert is_mark_of_folder(mark) and not is_mark_of_folder("0" * 40)
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    (folder / "run.json").write_bytes(b"{}")
    weights.write_bytes(b"x" + content[1:])
    assert mark_of(str(folder)) == mark, "the first byte of 1.28 million is not read"
    for changed in (content[:-1] + b"x", content[:-1]):
        weights.write_bytes(changed)
        assert mark_of(str(folder)) != mark
    weights.write_bytes(content)
    (folder / "tokenizer.json").write_bytes(b"[2]")
    assert mark_of(str(folder)) != mark


def test_what_is_not_here_has_no_mark() -> None:
    """Neither a repository that nobody has loaded, nor what can be no repository's name."""
    assert mark_of("nobody/nothing") == mark_of("output/stage_I/x") == ""
    assert revision_of("nobody/nothing") == "nobody/nothing" and revision_of("output/stage_I/x") == "output/stage_I/x"
