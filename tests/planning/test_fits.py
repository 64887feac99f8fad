"""What fits on which card: the table in the docs is what the command prints, and few bits are counted as few."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.shapes import SHAPES
from llm2vec.__main__ import main
from llm2vec.planning.activations import BITS_OF_BASE
from llm2vec.planning.fits import WAYS, bytes_at_most
from llm2vec.types import UserError

PAGE = Path(__file__).parents[2] / "docs/guides/small_cards.md"

#: Bases of the table -> parts of their names in `SHAPES`.
BASES = {
    "SmolLM2-135M": "smollm2", "Llama-3.2-1B": "Llama-3.2-1B", "Qwen2.5-1.5B": "Qwen2.5-1.5B",
    "Llama-3.2-3B": "Llama-3.2-3B", "Llama-3.1-8B": "Llama-3.1-8B",
}  # fmt: skip


@pytest.fixture
def shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bases' published shapes, in folders of their names."""
    monkeypatch.chdir(tmp_path)
    for name, part in BASES.items():
        SHAPES[part][0].save_pretrained(name)


@pytest.mark.slow
def test_the_table_in_the_docs_is_what_is_printed(shapes: None, capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", "--bases", *BASES])
    printed = capsys.readouterr().out
    assert printed.count("\n") == 2 + len(BASES) * len(WAYS)
    assert printed in PAGE.read_text(encoding="utf-8")


def test_four_bits_save_what_the_layers_weights_lose(shapes: None) -> None:
    """Of Llama-3.2-1B: the matrices of its 16 layers, in 4 bits and a share of the scales in place of 16."""
    plain, few = (bytes_at_most("Llama-3.2-1B", 2048, WAYS[way]) for way in ("LoRA", "LoRA over 4 bits"))
    a_layer = 2048 * 2048 * 2 + 2 * 2048 * 512 + 3 * 2048 * 8192
    bits = BITS_OF_BASE["4bit"]
    assert bits is not None and 4.12 < bits < 4.13  # QLoRA (Dettmers et al. 2023): 0.127 bits a weight beside the 4
    assert plain - few == pytest.approx(16 * a_layer * (16 - bits) / 8, rel=1e-9)


def test_a_config_or_bases_are_needed() -> None:
    for arguments in ([], ["config.json", "--bases", "x"]):
        with pytest.raises(UserError, match="a config is needed, or --bases for a table of what fits on which card"):
            main(["plan", *arguments])
