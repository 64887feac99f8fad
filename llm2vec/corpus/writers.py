"""Who writes a query for a passage (doc2query), or an answer to a query: a language model, the decoder of Stage I, or a
server."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from llm2vec.choice import ModelChoice
from llm2vec.corpus.server import Refusal, request_json
from llm2vec.files import json_hash, parse_json, read_object, remove, write_json, write_text
from llm2vec.types import UserError

logger = logging.getLogger(__name__)

#: Characters of a text that are read.
MOST_CHARACTERS = 2000
#: Texts of a part: what a killed start loses at most.
PART_TEXTS = 64
#: Texts that are written for at once, and requests that a server gets at a time.
TEXTS_AT_ONCE, REQUESTS_AT_ONCE = 16, 8
#: What vLLM, SGLang and llama.cpp hand to a chat template.
WITHOUT_THINKING = {"chat_template_kwargs": {"enable_thinking": False}}

#: One query or answer a text; empty where nothing was written.
Write = Callable[[list[str]], list[str]]


class Writing(NamedTuple):
    """What is written for a text."""

    request: str  #: stands before the text in a chat's turn
    without_chat: str  #: what a model without a chat template goes on from, with the text as `{}`
    most_tokens: int  #: of what is written
    is_line: bool  #: whether it is one line, and nothing where it was cut off

    def turn(self, text: str) -> str:
        """What a chat model is asked."""
        return f"{self.request}{text[:MOST_CHARACTERS]}"

    def read(self, written: str, ended: bool) -> str:
        """What of the writing stays."""
        if not self.is_line:
            return written.strip()
        return _query_of(written) if ended else ""


_ASKS_QUERY = (
    "Write one short question that the following text answers, in the language of the text. "
    "Write the question alone.\n\n"
)
QUERY = Writing(_ASKS_QUERY, "{}\n\nQuestion:", most_tokens=48, is_line=True)
ANSWER = Writing("", "Question: {}\n\nAnswer:", most_tokens=500, is_line=False)


def write_in_parts(
    writer: Callable[[], Write], task: Writing, texts: Sequence[str], work: Path, settings: Mapping[str, Any]
) -> list[str]:
    """What is written for each text, by parts that are files in the folder `work`: a killed start is gone on with.

    `writer` opens who writes, if anything is left to write; the `task` and `settings` are what decides that beside the
    texts. A `UserError` where the folder holds what was written for other texts, or under other settings.
    """
    settings = {"texts": json_hash(list(texts)), **task._asdict(), **settings}
    if (work / "settings.json").is_file():
        if read_object(work / "settings.json") != settings:
            raise UserError(f"{work} holds what was written for other texts or by another writer; give another folder.")
    else:
        remove(work)
        work.mkdir(parents=True)
        write_json(work / "settings.json", settings)
    write: Write | None = None
    found: list[str] = []
    for start in range(0, len(texts), PART_TEXTS):
        file = work / f"part-{start:010d}.json"
        if not file.is_file():
            write, some = write or writer(), list(texts[start : start + PART_TEXTS])
            at_once = range(0, len(some), TEXTS_AT_ONCE)
            written = [one for i in at_once for one in write(some[i : i + TEXTS_AT_ONCE])]
            write_text(file, json.dumps(written))
            logger.info("written for %s of %s texts", f"{start + len(some):,}", f"{len(texts):,}")
        found += parse_json(file.read_bytes(), str(file))
    return found


def write_by_model(choice: ModelChoice, task: Writing) -> Write:
    """A causal language model with its chat template, or without one by going on from a line; it must load."""
    from llm2vec.model.backbone import default_device, ends_of, load_backbone, load_tokenizer

    chain = choice.opened()
    tokenizer = load_tokenizer(chain.tokenizer_folder)
    model: Any = load_backbone(chain, dtype=choice.torch_dtype, with_lm_head=True)
    model.to(default_device()).eval()  # torch's mode without dropout
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    def prompt_of(text: str) -> str:
        if not tokenizer.chat_template:
            return task.without_chat.format(text[:MOST_CHARACTERS])
        asked = [{"role": "user", "content": task.turn(text)}]
        form: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
        return str(tokenizer.apply_chat_template(asked, **form))

    @torch.no_grad()
    def write(texts: list[str]) -> list[str]:
        asked = tokenizer(
            [prompt_of(text) for text in texts], return_tensors="pt", padding=True,
            add_special_tokens=not tokenizer.chat_template,  # which writes its own
        ).to(model.device)  # fmt: skip
        how = {"max_new_tokens": task.most_tokens, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
        ids = model.generate(**asked, **how)
        new = ids[:, asked["input_ids"].shape[1] :]
        ends = torch.tensor([*ends_of(model), tokenizer.pad_token_id], device=new.device)
        has_ended = torch.isin(new[:, -1], ends).tolist()  # what was cut off is no question
        written = tokenizer.batch_decode(new, skip_special_tokens=True)
        return [task.read(text, ended) for text, ended in zip(written, has_ended, strict=True)]

    return write


def write_by_anchors(choice: ModelChoice) -> Write:
    """A Stage I checkpoint that decodes: what it writes behind a passage's anchor (EBD2Q), the likeliest token each
    time."""
    from llm2vec.probes.reconstruction import load_reconstructor, text_of_side

    reconstructor = load_reconstructor(choice)

    def write(texts: list[str]) -> list[str]:
        sides = [text_of_side("document", text) for text in texts]
        return [_query_of(one) for (one,) in reconstructor.generate(sides, QUERY.most_tokens)]

    return write


def write_by_server(url: str, model: str, task: Writing) -> Write:
    """A server with OpenAI's interface, at a `url` up to `/v1`, and the name of its model there, which writes without
    thinking where the server can tell its chat template so. A text that it refuses (HTTP 400), as by a filter of
    contents, gets nothing, unless it has answered none."""
    place = f"{url.rstrip('/')}/chat/completions"
    knows_template = True  # until it has refused its key, and not what is asked
    has_answered = False

    def ask(text: str) -> str:
        nonlocal knows_template
        message = {"role": "user", "content": task.turn(text)}
        body = {"model": model, "messages": [message], "max_tokens": task.most_tokens, "temperature": 0}
        if knows_template:
            try:
                return task.read(*request_json(place, {**body, **WITHOUT_THINKING}, _content_of))
            except Refusal as refusal:
                if refusal.code not in (400, 422):
                    raise
        written = task.read(*request_json(place, body, _content_of))
        knows_template = False
        return written

    def ask_or_refusal(text: str) -> str | Refusal:
        try:
            return ask(text)
        except Refusal as refusal:
            if refusal.code != 400:
                raise
            return refusal

    def write(texts: list[str]) -> list[str]:
        nonlocal has_answered
        with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
            found = list(pool.map(ask_or_refusal, texts))
        refusals = [one for one in found if isinstance(one, Refusal)]
        has_answered = has_answered or len(refusals) < len(found)
        if refusals and not has_answered:
            raise refusals[0]
        return ["" if isinstance(one, Refusal) else one for one in found]

    return write


def _content_of(answer: dict[str, Any]) -> tuple[str, bool]:
    choice = answer["choices"][0]
    return choice["message"]["content"] or "", choice.get("finish_reason") != "length"


def _query_of(written: str) -> str:
    """The first line of what was written, without a word that announces it, and quotes."""
    lines = [line.strip() for line in written.splitlines() if line.strip()]
    return lines[0].removeprefix("Question:").strip().strip('"').strip() if lines else ""
