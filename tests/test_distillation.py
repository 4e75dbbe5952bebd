"""What is asked of a distillation: read from text and recipes, and refused with a reason where it makes no sense."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from edgekit.distillation import KINDS, Distillation
from edgekit.errors import TargetError
from edgekit.toml_file import Table, validate


class Recipe(Table):
    """A file with a table of it."""

    distill: Distillation


def test_text_as_on_the_command_line_says_the_same_as_tuples() -> None:
    said = Distillation.model_validate({"kind": "response, feature,response", "pairs": "a = b.c, d", "scores": "x,y"})
    assert said == Distillation(kind=("response", "feature"), pairs=(("a", "b.c"), ("d", "d")), scores=("x", "y"))
    assert said == Distillation.model_validate(
        {"kind": ["response", "feature"], "pairs": ["a=b.c", ["d", "d"]], "scores": ["x", "y"]}
    )
    assert hash(said) == hash(said.model_copy())


def test_all_kinds_are_known_and_none_of_the_outputs_reads_features() -> None:
    assert [Distillation(kind=(kind,)).reads_features for kind in KINDS] == [False, True, True, True, True]


def test_summary_says_what_counts() -> None:
    assert Distillation().summary == "response, offline, temperature 4, 50% on labels"
    said = Distillation(kind=("feature", "rkd"), scheme="self", hard=0.1)
    assert said.summary == "feature + rkd, self, 10% on labels"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kind": "respons"}, "'respons' is no kind of distillation; did you mean 'response'? known kinds: response, feature, "),
        ({"kind": ""}, "no kind is named"),
        ({"kind": 3}, "'distill.kind' is 3: input should be a valid tuple"),
        ({"scheme": "mutual"}, "'distill.scheme' is 'mutual': input should be 'offline', 'online' or 'self'"),
        ({"temperature": 0}, "'distill.temperature' is 0: input should be greater than 0"),
        ({"temperature": float("inf")}, "'distill.temperature' is inf: input should be a finite number"),
        ({"hard": 1.5}, "'distill.hard' is 1.5: input should be less than or equal to 1"),
        ({"hard": float("nan")}, "'distill.hard' is nan"),
        ({"weight": -1}, "'distill.weight' is -1: input should be greater than or equal to 0"),
        ({"kind": "feature", "pairs": "a="}, "'a=' is no pair of layers; write STUDENT_LAYER=TEACHER_LAYER, or one name for both"),
        ({"kind": "feature", "pairs": "=b"}, "'=b' is no pair of layers"),
        ({"pairs": "a=b"}, "'pairs' names layers, but 'response' reads none; add a kind that does (feature, attention, rkd, similarity)"),
        ({"scheme": "online", "hard": 0}, "two models that learn from each other alone learn nothing; raise it"),
        ({"temprature": 2}, "unknown key 'distill.temprature'; did you mean 'temperature'?"),
    ],
)  # fmt: skip
def test_mistakes_are_explained(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError):
        Distillation.model_validate(wrong)
    with pytest.raises(TargetError) as caught:
        validate({"distill": wrong}, Recipe, path=Path("recipe.toml"))
    assert message in str(caught.value)


def test_the_record_costs_no_torch() -> None:
    code = "import sys, edgekit.distillation; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
