"""Distillation as users ask for it: what a student learns from a teacher, who the teacher is, and how much each part counts."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from edgekit.toml_file import Table
from edgekit.words import nearest

RESPONSE, FEATURE, ATTENTION, RKD, SIMILARITY = "response", "feature", "attention", "rkd", "similarity"
KINDS = (RESPONSE, FEATURE, ATTENTION, RKD, SIMILARITY)
"""What is learned: outputs; features of layers; where features are large; distances and angles between samples; likeness of samples."""

Scheme = Literal["offline", "online", "self"]


def _listed(value: object) -> object:
    """`"a, b"` as `["a", "b"]`."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _known_kinds(kinds: tuple[str, ...]) -> tuple[str, ...]:
    for kind in kinds:
        if kind not in KINDS:
            near = nearest(kind, KINDS)
            hint = f"did you mean {near!r}? " if near else ""
            raise ValueError(f"{kind!r} is no kind of distillation; {hint}known kinds: {', '.join(KINDS)}")
    if not kinds:
        raise ValueError(f"no kind is named; known kinds: {', '.join(KINDS)}")
    return tuple(dict.fromkeys(kinds))


def _both_names(value: object) -> object:
    """`"a=b"` as `("a", "b")`, and `"a"` as `("a", "a")`."""
    listed = _listed(value)
    if not isinstance(listed, list | tuple):
        return listed
    return [_two_names(part) if isinstance(part, str) else part for part in listed]


def _two_names(text: str) -> tuple[str, str]:
    student, equals, teacher = (part.strip() for part in text.partition("="))
    if not student or (equals and not teacher):
        raise ValueError(f"{text!r} is no pair of layers; write STUDENT_LAYER=TEACHER_LAYER, or one name for both")
    return student, teacher or student


class Distillation(Table):
    """What a student learns from a teacher.

    The loss is `hard · labels + (1 - hard) · (response + weight · the other kinds)`; without labels `hard` counts as 0.

    Attributes:
        kind: one or more of `KINDS`; as text, separated by commas.
        scheme: "offline" has a frozen teacher; "online" trains teacher and student together, each with the other's outputs;
            "self" has a frozen copy of the student as the teacher, such as the float model of a quantized one.
        temperature: of "response": above 1, small scores count more.
        hard: share of the ordinary loss on labels, 0 to 1.
        weight: of all kinds but "response"; each of them is about 1 for a student that knows nothing.
        pairs: layers whose features are compared, (student's, teacher's); as text `a=b`, or one name for both. When empty, the last
            layers of each resolution are paired.
        scores: names of the student's outputs that hold class scores; None finds them by shape and name. Other outputs are numbers
            to be met as they are.
    """

    kind: Annotated[tuple[str, ...], BeforeValidator(_listed), AfterValidator(_known_kinds)] = (RESPONSE,)
    scheme: Scheme = "offline"
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 4.0
    hard: Annotated[float, Field(ge=0, le=1)] = 0.5
    weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    pairs: Annotated[tuple[tuple[str, str], ...], BeforeValidator(_both_names)] = ()
    scores: Annotated[tuple[str, ...], BeforeValidator(_listed)] | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.pairs and not self.reads_features:
            listed = ", ".join(kind for kind in KINDS if kind != RESPONSE)
            raise ValueError(f"'pairs' names layers, but 'response' reads none; add a kind that does ({listed})")
        if self.scheme == "online" and self.hard == 0:
            raise ValueError(
                "'hard' is 0 with the scheme 'online': two models that learn from each other alone learn nothing; raise it"
            )
        return self

    @property
    def reads_features(self) -> bool:
        """Whether layers within the networks are compared, not only their outputs."""
        return any(kind != RESPONSE for kind in self.kind)

    @property
    def summary(self) -> str:
        """The main choices in a few words: `response + rkd, offline, temperature 4, 50% on labels`."""
        parts = [" + ".join(self.kind), self.scheme]
        if RESPONSE in self.kind:
            parts.append(f"temperature {self.temperature:g}")
        return ", ".join([*parts, f"{self.hard:.0%} on labels"])
