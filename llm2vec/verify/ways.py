"""The ways to load an embedder, as a user names them (`llm2vec verify --help`), and what each writes before a text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, get_args

from transformers import PreTrainedTokenizerBase

from llm2vec.choice import ModelChoice
from llm2vec.files import read_object
from llm2vec.hub import find_file
from llm2vec.model.backbone import load_tokenizer
from llm2vec.model.chain import is_stock, open_chain
from llm2vec.model.settings import SETTINGS_FILE, EncoderSettings, row_tokenizer
from llm2vec.model.stock_form import possible_forms
from llm2vec.text.batches import shared_start
from llm2vec.text.tokenization import RowTokenizer
from llm2vec.types import InstructedText, UserError

LocalKind = Literal["ours", "padded", "merged", "st", "transformers"]

#: How a way is called in a table.
LABELS = {
    "ours": "ours",
    "padded": "ours, padded",
    "merged": "ours, merged",
    "st": "sentence-transformers",
    "transformers": "transformers",
    "server": "server",
}


class Choice(NamedTuple):
    """One way to load, before anything is loaded."""

    kind: LocalKind | Literal["server"]  #: a key of `LABELS`
    model: ModelChoice  #: what is loaded; of a server, the base is its URL

    @property
    def name(self) -> str:
        """Way and place."""
        return f"{LABELS[self.kind]} {self.model.place}"


def choices_of(argument: str) -> tuple[list[Choice], list[str]]:
    """The ways that an argument stands for, and a line for each that does not apply to such a folder. A `UserError`
    where there is no such folder, or no model in it."""
    if argument.startswith(("http://", "https://")):
        return [Choice("server", ModelChoice(argument))], []
    kind, colon, rest = argument.partition(":")
    named = bool(colon) and kind in get_args(LocalKind)
    model = ModelChoice.parse(rest if named else argument)
    for part in (model.base, *model.adapters):
        if not part or (find_file(part, "config.json") or find_file(part, "adapter_config.json")) is None:
            raise UserError(
                f"{argument}: {part!r} is no folder or hub name with a config.json or adapter_config.json; allowed: "
                f"PATH, PATH+ADAPTER, {', '.join(f'{k}:PATH' for k in get_args(LocalKind))}, http://HOST:PORT."
            )
    if named:
        return [Choice(kind, model)], []  # type: ignore[arg-type]
    outermost = (model.base, *model.adapters)[-1]
    is_adapter = bool(model.adapters) or find_file(model.base, "config.json") is None
    stock = is_stock(outermost) and not model.adapters
    is_ours = find_file(outermost, SETTINGS_FILE) is not None or not stock
    applies: dict[LocalKind, bool] = {
        "ours": is_ours,
        "padded": is_ours and (is_adapter or not stock),
        "merged": is_ours and is_adapter,
        "st": stock,
        "transformers": stock,
    }
    notes = []
    if not is_ours:
        notes.append(f"{argument}: no {SETTINGS_FILE}, so loading it as ours does not apply")
    if not stock and not model.adapters:
        notes.append(f"{argument}: no export, so sentence-transformers and transformers do not apply")
    return [Choice(kind, model) for kind, does in applies.items() if does], notes


class Rendering(NamedTuple):
    """How every way's texts are to be written."""

    rows: RowTokenizer  #: renders the template
    #: characters that a tokenizer of the stock form writes before a text by itself, so that no
    #: prompt does.
    written: str


def rendering_of(choices: Sequence[Choice]) -> Rendering | None:
    """The first template that a way's folders record; None where none does."""
    local = [choice for choice in choices if choice.kind != "server"]
    for choice in local:
        chain = open_chain(choice.model.base, choice.model.adapters)
        if not chain.settings:
            continue
        settings = EncoderSettings(**chain.settings)
        rows = row_tokenizer(load_tokenizer(chain.tokenizer_folder), settings)
        stock = next((c.model.base for c in local if is_stock(c.model.base)), None)
        written = possible_forms(rows, settings)[0].written if stock is None else _own_header(load_tokenizer(stock))
        return Rendering(rows, written)
    return None


def prompt_writer(
    rendering: Rendering | None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    declared: Mapping[str, str | None] = MappingProxyType({}),
) -> Callable[[InstructedText], str]:
    """What a user of a way that takes strings writes before a text, so that it becomes our template's row.

    A text without an instruction gets the prompt that is `declared` for its side. With one it gets what the template
    writes before a text, without what the way's tokenizer writes by itself; without one (None), a server's counts as
    one of the stock form. Without a `rendering` it gets the instruction and a blank.
    """
    if rendering is None:
        return lambda text: f"{text.instruction} " if text.instruction else ""
    written = rendering.written if tokenizer is None else _own_header(tokenizer)

    def prompt(text: InstructedText) -> str:
        if not text.instruction and text.side in declared:
            return declared[text.side] or ""
        return rendering.rows.opening(text.instruction, text.side)[1].removeprefix(written)

    return prompt


def _own_header(tokenizer: Any) -> str:
    """The characters that a tokenizer puts before every text, behind the special tokens there."""
    first, second = (tokenizer(text)["input_ids"] for text in ("a", "0"))
    header = first[: shared_start(first, second)]
    special = [i for i, token in enumerate(header) if token in tokenizer.added_tokens_decoder]
    return str(tokenizer.decode(header[special[-1] + 1 if special else 0 :]))


def read_json_of(folder: str, name: str) -> dict[str, Any] | None:
    """The JSON object of a folder's file; None where it has no such file."""
    file = find_file(folder, name)
    return None if file is None else read_object(Path(file))
