"""A template in the words of stock libraries: what the tokenizer writes around a text, and prompts before it.

    ids before + (prompt + text) + ids behind

A stock tokenizer writes the ids before and behind by its post-processor, so they survive truncation and are there even
if a server knows nothing of prompts. What a template says as text (an instruction and its join, `Query: `) becomes a
prompt of sentence-transformers. Fixed text that every row begins with (`user` and a line break) is written by the
tokenizer too, where the ids then are the same; else it is part of every prompt.

No prompt holds a special token, so the tokenizer never needs to read one. It is told to keep the look-alikes of a
user's text as text (`split_special_tokens`). transformers, sentence-transformers and vLLM obey. What reads
`tokenizer.json` alone, such as text-embeddings-inference, does not know it.

Mean pooling that leaves the instruction out is `include_prompt: false`. sentence-transformers then counts the tokens of
the prompt rendered alone, with the ids before, less one for a closing special token. Without a prompt it counts
nothing, so every text needs one there. A prompt's last blank must not count, as it mostly joins the text's first token:
the tokenizer drops blanks at the end of what it is given. Where the blank is a token of its own (before a digit, in
most vocabularies), such a mean reads it and ours does not: `STRAY_BLANK` is said then. No count of a prompt's tokens
can tell the two apart. transformers 5 gives Qwen2 models a tokenizer that drops no blanks, so there an instruction that
ends in a blank is refused.

`LLM2Vec` strips texts and nobody else does: whoever uses the stock form strips them. Whether all of this holds for a
tokenizer is not argued but tried, on probe texts.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

from tokenizers import Tokenizer

from llm2vec.files import write_json
from llm2vec.model.backbone import Backbone
from llm2vec.model.settings import EncoderSettings, set_attention
from llm2vec.text.batches import shared_start
from llm2vec.text.probe_texts import PROBE_TEXTS
from llm2vec.text.templates import forms_of
from llm2vec.text.tokenization import Row, RowTokenizer
from llm2vec.types import Attention, InstructedText, PoolingMode, TextSide, UserError, needs_extra

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)

#: Our pooling modes in sentence-transformers' words, and the switches that older readers look for. A reader takes the
#: first switch that is on, so they stand before `include_prompt`.
POOLING: dict[PoolingMode, str] = {
    "last": "lasttoken", "mean": "mean", "weighted_mean": "weightedmean", "first": "cls",
}  # fmt: skip
SWITCHES = {
    "cls": "pooling_mode_cls_token", "mean": "pooling_mode_mean_tokens", "max": "pooling_mode_max_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens", "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}  # fmt: skip

#: Class paths that every version of sentence-transformers, and every engine that reads its files, knows.
_MODULES = (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))

_NEEDED = "this needs sentence-transformers, 6 or newer"

#: Before this version, transformers ignores `is_causal: false` without a word.
BIDIRECTIONAL_SINCE = "5.2"

#: Further probe texts: what may join with the characters before it, and what may look like the template's own.
_MORE_PROBES = ("7 days", "'s not 12 o'clock", "\u0301e\u0301 ﬁne ½", "🙂 مرحبا नमस्ते", "Query: user\n\nfind it", "x")

#: What is said where a tokenizer has the mean read a blank.
STRAY_BLANK = (
    "Mean pooling by sentence-transformers: where no token joins a text's first letters with the blank before them, as "
    "before a digit, the mean under an instruction reads this blank too, which here counts to the instruction."
)


@dataclass(frozen=True)
class StockForm:
    """A template as ids before a text, prompts, and ids behind it."""

    rows: RowTokenizer  #: renders the template; what the stock form must equal
    before: tuple[int, ...]  #: ids that the tokenizer writes first
    written: str  #: characters that `before` ends with, so that no prompt repeats them
    behind: tuple[int, ...]  #: ids that the tokenizer writes last
    pooling_mode: PoolingMode
    include_prompt: bool  #: whether pooling reads what stands before the text

    def prompt(self, instruction: str, side: TextSide = "query") -> str:
        """The prompt of an instruction; empty = the tokenizer writes all there is."""
        return self.rows.opening(instruction, side)[1].removeprefix(self.written)

    def prompts(self, instructions: Mapping[str, str]) -> dict[str, str]:
        """Prompts by name: `query` and `document`, without an instruction, and one for each named instruction.

        An instruction named `query` is that of the prompt `query`, which clients use for queries unless told otherwise.
        For the task NFCorpus that is `NFCorpus`, and `NFCorpus-document` for its documents, which carry none: so mteb
        asks for them. A `UserError` where a name is taken, so that an instruction would replace another prompt.
        """
        document = self.prompt("", "document")
        named = {"query": self.prompt(instructions.get("query", "")), "document": document}
        for name, instruction in instructions.items():
            if name == "query":
                continue
            added = {name: self.prompt(instruction), f"{name}-document": document}
            if taken := sorted(added.keys() & named.keys()):
                raise UserError(f"instructions: {name!r} makes a second prompt of the name {taken[0]!r}; rename it.")
            named |= added
        return named


class StockModel(NamedTuple):
    """A model under sentence-transformers, and the form it renders texts by."""

    form: StockForm
    model: SentenceTransformer


def stock_model(
    model: Backbone, rows: RowTokenizer, settings: EncoderSettings, instructions: Mapping[str, str]
) -> StockModel:
    """A SentenceTransformer around a model that is there already, through the files that an export holds.

    The model is a decoder without head, plain or with an adapter on it; its weights are shared. Its own config is set
    to the attention of the settings, which its forward pass then uses by itself. `instructions` are as in
    `StockForm.prompts`. A `UserError` where sentence-transformers is not there, or cannot say what the template says.
    """
    check_expressible(rows, settings)
    set_attention(model.config, settings.attention)
    model.config.use_cache = False
    differences = []
    for form in possible_forms(rows, settings):
        with tempfile.TemporaryDirectory() as folder:
            model.config.save_pretrained(folder)
            write_form(Path(folder), form, model.config.hidden_size, settings.attention, instructions)
            stock = _around(model, Path(folder))
        compared = [compare_text(stock, form, text) for text in probes(rows)]
        difference = next((c.difference for c in compared if c.difference is not None), None)
        if difference is None:
            if any(c.stray_blank for c in compared):
                logger.warning(STRAY_BLANK)
            return StockModel(form, stock)
        differences.append(difference)
    raise UserError(f"template {rows.template!r} cannot be said in sentence-transformers' files: {differences[-1]}.")


def check_expressible(rows: RowTokenizer, settings: EncoderSettings) -> None:
    """Refuse what no tokenizer with prompts can say, by a `UserError` that names the reason."""
    template, skips = rows.template, _skips_instruction(settings)
    forms = forms_of(template, settings.pooling_mode)[0].values()
    if any(sum(segment.kind == "text" for segment in form) > 1 for form in forms):
        raise UserError(f"template {template!r} writes the text twice, and a stock tokenizer writes it once.")
    if len({_behind(rows, side) for side in get_args(TextSide)}) > 1:
        raise UserError(f"template {template!r} ends queries and documents differently, and a tokenizer has one end.")
    if skips and settings.pooling_mode == "weighted_mean":
        raise UserError(
            "pooling_mode is 'weighted_mean' without the instruction: sentence-transformers weights a token by its "
            "place in the whole row, this project by its place behind the instruction."
        )
    if skips and settings.instruction_mask == "counted":
        raise UserError(
            "instruction_mask is 'counted', as upstream LLM2Vec leaves the instruction out, and sentence-transformers "
            "leaves out a prompt's own tokens; load the model with instruction_mask 'offsets'."
        )
    room = settings.max_length - min(_bare_row(rows, side).target.count(False) for side in get_args(TextSide))
    if settings.doc_max_length is not None and settings.doc_max_length < room:
        raise UserError(
            f"doc_max_length is {settings.doc_max_length}, and a stock tokenizer knows one limit, that of the whole "
            f"row; load the model with doc_max_length {settings.max_length}, so that texts may fill the row."
        )
    if not skips:
        return
    behind = _behind(rows, "query")
    tokens = rows.tokenizer.convert_ids_to_tokens(list(behind))
    if len(behind) > 1 or not set(behind) <= set(rows.tokenizer.added_tokens_decoder):
        raise UserError(
            f"template {template!r} closes a text with {tokens}; under mean pooling without the instruction, "
            "sentence-transformers allows for one special token there and would leave out text in place of the others."
        )
    for before, characters in (rows.opening("", side) for side in get_args(TextSide)):
        if before and not characters:
            begins = rows.tokenizer.convert_ids_to_tokens(before)
            raise UserError(
                f"template {template!r} begins a text that has no instruction with {begins}; mean pooling leaves these "
                "out here, and sentence-transformers only what belongs to a prompt."
            )


def possible_forms(rows: RowTokenizer, settings: EncoderSettings) -> list[StockForm]:
    """Ways to say a template, the better first: its opening text in the tokenizer, or in the prompts."""
    skips = _skips_instruction(settings)
    before, characters = rows.opening("")
    form = StockForm(rows, tuple(before), "", _behind(rows, "query"), settings.pooling_mode, not skips)
    openings = [rows.opening(instruction, side)[1] for instruction in ("", "find") for side in get_args(TextSide)]
    shared = all(opening.startswith(characters) for opening in openings)
    if not (characters and shared) or skips:  # left out of pooling is a prompt alone, so there it must stay one
        return [form]
    row = _bare_row(rows, "query")
    return [replace(form, before=tuple(row.ids[: row.target.index(True)]), written=characters), form]


def write_form(
    folder: Path, form: StockForm, hidden_size: int, attention: Attention, instructions: Mapping[str, str]
) -> None:
    """Write everything but config and weights: the tokenizer's files and sentence-transformers'."""
    _write_tokenizer(folder, form, attention)
    pooling, prompts = POOLING[form.pooling_mode], form.prompts(instructions)
    versions = {"sentence_transformers": "sentence-transformers", "transformers": "transformers", "pytorch": "torch"}
    top: dict[str, Any] = {
        "model_type": "SentenceTransformer",
        "__version__": {name: importlib.metadata.version(package) for name, package in versions.items()},
        "prompts": prompts,
        "default_prompt_name": "document" if prompts["document"] else None,
        "similarity_fn_name": "cosine",
    }
    if attention == "bidirectional":
        reason = "older versions ignore is_causal: false, attend causally and give other vectors"
        top["requirements"] = {"transformers": {"specifier": f">={BIDIRECTIONAL_SINCE}", "reason": reason}}
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{name}"}
        for i, (path, name) in enumerate(_MODULES)
    ]
    switches = {switch: mode == pooling for mode, switch in SWITCHES.items()}
    pools = {"word_embedding_dimension": hidden_size, "pooling_mode": pooling, **switches}
    for path, _ in _MODULES[1:]:
        (folder / path).mkdir(exist_ok=True)
    write_json(folder / "modules.json", modules)
    write_json(folder / "1_Pooling/config.json", {**pools, "include_prompt": form.include_prompt})
    write_json(folder / "2_Normalize/config.json", {})
    lengths = {"max_seq_length": form.rows.max_length, "do_lower_case": False}
    write_json(folder / "sentence_bert_config.json", lengths)
    write_json(folder / "config_sentence_transformers.json", top)


def probes(rows: RowTokenizer) -> list[InstructedText]:
    """Texts in each form of a template, without an instruction and with one: accents, digits, other scripts, control
    tokens written out, and a text that is cut."""
    tokens = list(map(str, rows.tokenizer.added_tokens_decoder.values()))[:64]
    texts = [*(probe.text for probe in PROBE_TEXTS), *_MORE_PROBES, " ".join(tokens) or "x"]
    texts.append("long text " * rows.max_length)
    instructions = ("", PROBE_TEXTS[1].instruction)
    return [InstructedText(i, text, side) for side in rows.sides for i in instructions for text in texts]


class TextComparison(NamedTuple):
    """A text in the stock form, beside its row here."""

    #: What is rendered or pooled otherwise, in words; None = nothing.
    difference: str | None
    #: Whether the mean reads the blank before the text, which counts to the instruction here. A tokenizer has the last
    #: word on it: it joins the blank with a word, and leaves it alone before a digit.
    stray_blank: bool = False


def compare_text(stock: SentenceTransformer, form: StockForm, text: InstructedText) -> TextComparison:
    """What a stock SentenceTransformer makes of one text, its tokens and which of them it pools."""
    stripped = text.text.strip()
    (row,) = form.rows.rows([text])
    features = stock.preprocess([stripped], prompt=form.prompt(text.instruction, text.side))
    ids = features["input_ids"][0].tolist()
    subject = f"{stripped[:40]!r} {f'under {text.instruction!r}' if text.instruction else 'without an instruction'}"
    if ids != row.ids:
        return TextComparison(f"{subject} becomes {_apart(form.rows.tokenizer, ids, row.ids)}")
    if form.pooling_mode in ("last", "first"):
        alike = row.pooled[-1 if form.pooling_mode == "last" else 0]
        return TextComparison(None if alike else f"of {subject} it reads another token")
    skipped = 0 if form.include_prompt else features.get("prompt_length") or 0
    if row.pooled == [position >= skipped for position in range(len(ids))]:
        return TextComparison(None)
    if row.pooled.index(True) == skipped + 1 and not str(form.rows.tokenizer.decode(ids[skipped])).strip():
        return TextComparison(None, stray_blank=True)
    return TextComparison(f"of {subject} it leaves {skipped} tokens out of the mean, not {row.pooled.index(True)}")


def _apart(tokenizer: Any, ids: Sequence[int], wanted: Sequence[int]) -> str:
    """Where two token rows part, in words."""
    at = shared_start(ids, wanted)
    found, expected = (tokenizer.convert_ids_to_tokens(list(row[at : at + 4])) for row in (ids, wanted))
    return f"{found} from token {at} on ({len(ids)} tokens), where {expected} should stand ({len(wanted)} tokens)"


def _skips_instruction(settings: EncoderSettings) -> bool:
    return settings.skip_instruction and settings.pooling_mode in ("mean", "weighted_mean")


def _bare_row(rows: RowTokenizer, side: TextSide) -> Row:
    return rows.rows([InstructedText("", "x", side)])[0]


def _behind(rows: RowTokenizer, side: TextSide) -> tuple[int, ...]:
    """Ids behind a text."""
    row = _bare_row(rows, side)
    return tuple(row.ids[len(row.ids) - row.target[::-1].index(True) :])


def _write_tokenizer(folder: Path, form: StockForm, attention: Attention) -> None:
    """`tokenizer.json` with the form's ids in its post-processor, and its config.

    Written as JSON, as the library's own constructor reads a token such as `:` as part of its notation.
    """
    tokenizer = form.rows.tokenizer
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content |= {"truncation": None, "padding": None, "post_processor": _post_processor(tokenizer, form)}
    if not form.include_prompt:
        drop_blanks = {"type": "Replace", "pattern": {"Regex": r" +\z"}, "content": ""}
        normalizers = [drop_blanks, *([content["normalizer"]] if content["normalizer"] else [])]
        content["normalizer"] = {"type": "Sequence", "normalizers": normalizers}
    Tokenizer.from_str(json.dumps(content)).save(str(folder / "tokenizer.json"))
    closing = tokenizer.convert_ids_to_tokens(list(form.behind[-1:]))
    named = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    named["pad_token"] = named["pad_token"] or named["eos_token"]
    write_json(
        folder / "tokenizer_config.json",
        {
            # Reads tokenizer.json as it stands; a family's own class may put a pipeline of its own in its place. Both
            # are the same class, the second by the name that it has since transformers 5. So transformers 4, which
            # would attend causally without a word, finds no tokenizer and stops.
            "tokenizer_class": "PreTrainedTokenizerFast" if attention == "causal" else "TokenizersBackend",
            **{name: token for name, token in named.items() if token is not None},
            "additional_special_tokens": [token for token in closing if token not in named.values()],
            "model_max_length": form.rows.max_length,
            # Under last pooling, the last position is each row's closing token.
            "padding_side": "left" if form.pooling_mode == "last" else "right",
            "truncation_side": "right",
            "split_special_tokens": True,
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
        },
    )


def _post_processor(tokenizer: Any, form: StockForm) -> dict[str, Any]:
    def written(ids: Sequence[int]) -> list[dict[str, Any]]:
        return [{"SpecialToken": {"id": name, "type_id": 0}} for name in tokenizer.convert_ids_to_tokens(list(ids))]

    ids = dict.fromkeys([*form.before, *form.behind])
    names = tokenizer.convert_ids_to_tokens(list(ids))
    single = [*written(form.before), {"Sequence": {"id": "A", "type_id": 0}}, *written(form.behind)]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {n: {"id": n, "ids": [i], "tokens": [n]} for n, i in zip(names, ids, strict=True)},
    }


def _around(model: Backbone, folder: Path) -> SentenceTransformer:
    """A stock SentenceTransformer by the files of a folder, around a model in memory."""
    with needs_extra(_NEEDED, "eval"):
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.base.modules import Transformer
        from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
    options = Transformer.load_config(str(folder))
    transformer = Transformer.__new__(Transformer)
    # The one step of its constructor that reads weights gives back the model that is there.
    transformer.__dict__["_load_model"] = lambda *_, **__: model
    Transformer.__init__(transformer, str(folder), **options)
    del transformer.__dict__["_load_model"]
    config = json.loads((folder / "config_sentence_transformers.json").read_text(encoding="utf-8"))
    return SentenceTransformer(
        modules=[transformer, Pooling.load(str(folder), subfolder="1_Pooling"), Normalize()],
        device=str(next(model.parameters()).device),
        **{name: config[name] for name in ("prompts", "default_prompt_name", "similarity_fn_name")},
    )
