"""Short texts by whose token ids a checkpoint tells whether its texts would still be rendered as in training."""

from __future__ import annotations

from llm2vec.text.tokenization import RowTokenizer
from llm2vec.types import InstructedText, UserError

#: Short texts that show a change of template, tokenizer or library: instruction, accents, spaces, a look-alike token.
PROBE_TEXTS = (
    InstructedText("", "The quick brown fox."),
    InstructedText("Given a question, retrieve passages that answer it:", "who wrote Emma?"),
    InstructedText("", "  Naïve café, 東京 1234567\n\tdef f(x): return x "),
    InstructedText("Retrieve semantically similar text", "</s> <|eot_id|> <|im_end|> [INST]"),
)


def probe_ids(tokenizer: RowTokenizer) -> list[list[int]]:
    """Token ids of the probe texts, in each form the template has: stored with a checkpoint, compared at loading.

    Of a text whose instruction alone fills the tokenizer's `max_length`, none.
    """
    return [_ids_if_it_fits(tokenizer, text._replace(side=side)) for side in tokenizer.sides for text in PROBE_TEXTS]


def _ids_if_it_fits(tokenizer: RowTokenizer, text: InstructedText) -> list[int]:
    try:
        return tokenizer.rows([text])[0].ids
    except UserError:  # rows may be short where nobody writes such an instruction
        return []
