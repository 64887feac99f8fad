"""Who writes a query for a passage (doc2query): a language model, the decoder of Stage I, or a server."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from llm2vec.choice import ModelChoice
from llm2vec.corpus.server import request_json

#: What a language model is asked; the passage follows.
REQUEST = "Write one short question that the following text answers. Write the question alone."
#: Tokens of a query, and characters of a passage that are read.
MOST_TOKENS, MOST_CHARACTERS = 48, 2000
#: Passages that are written for at once, and requests that a server gets at a time.
PASSAGES_AT_ONCE, REQUESTS_AT_ONCE = 16, 8

#: One query a passage; empty where nothing was written.
Write = Callable[[list[str]], list[str]]


def write_by_model(choice: ModelChoice) -> Write:
    """A causal language model with its chat template, or without one a line that begins with "Question:".

    Raises:
        UserError: it cannot be loaded.
    """
    from llm2vec.model.backbone import load_backbone, load_tokenizer

    chain = choice.opened()
    tokenizer = load_tokenizer(chain.tokenizer_path)
    model: Any = load_backbone(chain, dtype=choice.torch_dtype, with_lm_head=True)
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    def prompt_of(text: str) -> str:
        if not tokenizer.chat_template:
            return f"{text[:MOST_CHARACTERS]}\n\nQuestion:"
        asked = [{"role": "user", "content": f"{REQUEST}\n\n{text[:MOST_CHARACTERS]}"}]
        return str(tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True))

    @torch.no_grad()
    def write(texts: list[str]) -> list[str]:
        asked = tokenizer(
            [prompt_of(text) for text in texts], return_tensors="pt", padding=True, add_special_tokens=False
        ).to(model.device)
        ids = model.generate(**asked, max_new_tokens=MOST_TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        new = ids[:, asked["input_ids"].shape[1] :]
        ends = torch.tensor([*_ends_of(model), tokenizer.pad_token_id], device=new.device)
        has_ended = torch.isin(new[:, -1], ends).tolist()  # what was cut off is no question
        written = tokenizer.batch_decode(new, skip_special_tokens=True)
        return [_query_of(text) if ended else "" for text, ended in zip(written, has_ended, strict=True)]

    return write


def write_by_anchors(choice: ModelChoice) -> Write:
    """A Stage I checkpoint: what its decoder writes behind a passage's anchor (EBD2Q), token for token the likeliest.

    Raises:
        UserError: it cannot be loaded, or does not decode.
    """
    from llm2vec.probes.reconstruction import load_reconstructor, text_of_side

    reconstructor = load_reconstructor(choice)

    def write(texts: list[str]) -> list[str]:
        sides = [text_of_side("document", text) for text in texts]
        return [_query_of(one) for (one,) in reconstructor.generate(sides, MOST_TOKENS)]

    return write


def write_by_server(url: str, model: str) -> Write:
    """A server with OpenAI's interface (`server.request_json`).

    Args:
        url: up to `/v1`.
        model: its name there.
    """
    place = f"{url.rstrip('/')}/chat/completions"

    def ask(text: str) -> str:
        message = {"role": "user", "content": f"{REQUEST}\n\n{text[:MOST_CHARACTERS]}"}
        body = {"model": model, "messages": [message], "max_tokens": MOST_TOKENS, "temperature": 0}
        return _query_of(request_json(place, body, _content_of))

    def write(texts: list[str]) -> list[str]:
        with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
            return list(pool.map(ask, texts))

    return write


def _content_of(answer: dict[str, Any]) -> str:
    choice = answer["choices"][0]
    return "" if choice.get("finish_reason") == "length" else str(choice["message"]["content"])


def _ends_of(model: Any) -> list[int]:
    """The tokens with which a model ends what it generates."""
    ends = model.generation_config.eos_token_id
    return list(ends) if isinstance(ends, list) else [] if ends is None else [ends]


def _query_of(written: str) -> str:
    """The first line of what was written, without a word that announces it, and quotes."""
    lines = [line.strip() for line in written.splitlines() if line.strip()]
    return lines[0].removeprefix("Question:").strip().strip('"').strip() if lines else ""
