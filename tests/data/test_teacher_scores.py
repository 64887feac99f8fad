"""A teacher's scores in training rows."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from helpers import write_jsonl

from llm2vec.data.lines import check_row
from llm2vec.data.rows import read_rows
from llm2vec.types import UserError


def line(**fields: Any) -> bytes:
    return json.dumps({"query": "q", "positive": "d", "negative": ["n", "m"]} | fields).encode()


def test_scores_are_read_with_as_many_negatives_as_asked_for() -> None:
    whole = json.loads(line(pos_score=2, neg_scores=[0.5, -1]))
    assert check_row(whole, 2, "here", True)["scores"] == [2.0, 0.5, -1.0]
    assert check_row(whole, 1, "here", True) == {"query": "q", "positive": "d", "negative": ["n"], "scores": [2.0, 0.5]}
    assert "scores" not in check_row(whole, 2, "here")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "the field `pos_score` is missing, which distillation_weight needs"),
        ({"pos_score": 1.0}, "the field `neg_scores` is missing, which distillation_weight needs"),
        ({"pos_score": 1.0, "neg_scores": [1.0]}, "as many numbers as the row has negatives (2)"),
        ({"pos_score": 1.0, "neg_scores": 1.0}, "`neg_scores` must be a list"),
        ({"pos_score": None, "neg_scores": [1.0, 2.0]}, "None is no score"),
        ({"pos_score": True, "neg_scores": [1.0, 2.0]}, "True is no score"),
        ({"pos_score": 1.0, "neg_scores": [1.0, "2"]}, "'2' is no score"),
        ({"pos_score": math.nan, "neg_scores": [1.0, 2.0]}, "nan is no score"),
        ({"pos_score": 10**400, "neg_scores": [1.0, 2.0]}, "is no score"),
    ],
    ids=str,
)
def test_bad_scores_are_an_error_with_file_and_line(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    good = json.loads(line(pos_score=2, neg_scores=[0.5, -1]))
    file = write_jsonl(tmp_path / "a.jsonl", [good, json.loads(line(**fields))])
    with pytest.raises(UserError) as error:
        read_rows(file, 2, with_scores=True)
    assert str(error.value).startswith(f"{file}, line 2: ")
    assert message in str(error.value)
    assert len(read_rows(file, 2)[0]) == 2  # nobody asks for them
    assert read_rows(write_jsonl(tmp_path / "b.jsonl", [good]), 1, with_scores=True)[0][0]["scores"] == [2.0, 0.5]
