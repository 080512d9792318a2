"""What travels over HTTP: the one source of the OpenAPI document, shared by server and client.

pydantic only. Numbers that depend on the checkpoint (most classes, default steps) are in `Info`.
"""

from __future__ import annotations

import unicodedata
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    Base64Bytes,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
)

MAX_CLASSES = 64
MAX_CHARACTERS = 1000  # of a class name or a description, as in tina.prompts
MAX_WORDS = 16  # of one class, as in tina.prompts
MAX_IMAGES = 32  # of a prediction, or of one class in a prompt
MAX_IMAGE_BYTES = 8 * 2**20
MAX_BODY_BYTES = 16 * 2**20
MAX_PIXELS = 24_000_000  # of one picture, whatever it is compressed to
MAX_REQUEST_PIXELS = 128_000_000  # of all pictures of a request: 32 of 4 megapixels
MAX_STEPS = 1000
MAX_ID_CHARACTERS = 2048

Format = Literal["json", "safetensors", "onnx"]
MEDIA_TYPES: dict[Format, str] = {
    "json": "application/json",
    "safetensors": "application/vnd.safetensors",
    "onnx": "application/onnx",
}


def _printable(text: str) -> str:
    if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in text):
        raise ValueError("holds a control character")
    if not text.strip():
        raise ValueError("is empty")
    return text


Text = Annotated[str, Field(min_length=1, max_length=MAX_CHARACTERS), AfterValidator(_printable)]
Texts = Annotated[
    list[Text],
    Field(min_length=1, max_length=MAX_WORDS),
    BeforeValidator(
        lambda given: [given] if isinstance(given, str) else given,
        json_schema_input_type=Text
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_WORDS)],
    ),
    PlainSerializer(lambda texts: texts if len(texts) > 1 else texts[0]),
]
"""Of one class; one alone need not be a list."""
Image = Annotated[Base64Bytes, Field(description="A PNG, JPEG or WebP file in base64.")]
Shots = Annotated[list[Image], Field(min_length=1, max_length=MAX_IMAGES)]


class _Schema(BaseModel):
    """Strict: a number in quotes is an error, not a guess.

    An unknown key is ignored: a newer service's reply has more of them.
    """

    model_config = ConfigDict(frozen=True, strict=True)


class _Request(_Schema):
    """An unknown key is an error too."""

    model_config = ConfigDict(extra="forbid")


class ModelRequest(_Request):
    """A prompt: class names; a text or pictures per class in their place, pictures beside them."""

    classes: Annotated[
        list[Text],
        Field(
            min_length=2,
            max_length=MAX_CLASSES,
            description="Names of the classes, in the order of the logits; each once.",
            examples=[["three", "five", "eight"]],
        ),
    ]
    descriptions: Annotated[
        list[Texts | None] | None,
        Field(
            max_length=MAX_CLASSES,
            description="Per class a text in place of its name, several of which it is any, or "
            "null.",
        ),
    ] = None
    images: Annotated[
        list[Shots] | None,
        Field(max_length=MAX_CLASSES, description="Pictures per class, in place of its name."),
    ] = None
    examples: Annotated[
        list[Annotated[list[Image], Field(max_length=MAX_IMAGES)]] | None,
        Field(
            max_length=MAX_CLASSES,
            description="Pictures per class, beside its name or description, or an empty list: of "
            "those that have some, two at least, rows that nothing was trained on learn.",
        ),
    ] = None
    seed: Annotated[int, Field(ge=0, lt=2**63, description="Of the initial noise.")] = 0
    steps: Annotated[
        int | None,
        Field(ge=1, le=MAX_STEPS, description="Denoising steps; default: the checkpoint's."),
    ] = None
    guidance: Annotated[
        float | None,
        Field(
            ge=0,
            le=20,
            allow_inf_nan=False,
            description="Classifier-free guidance, 1 is none; default: the checkpoint's.",
        ),
    ] = None
    strict: Annotated[
        bool, Field(description="Refuse a prompt that is less familiar than the threshold.")
    ] = False


class ModelReply(_Schema):
    """A generated classifier, without its weights."""

    id: Annotated[
        str,
        Field(
            description="Names the model on every replica while its checkpoint is served; one made "
            "of pictures or long texts for about a day after its last use."
        ),
    ]
    classes: list[str]
    familiarity: Annotated[
        list[float],
        Field(description="Per class, 0..1: how well the training classes cover the prompt."),
    ]
    nearest: Annotated[
        list[str], Field(description="Per class, the training class nearest to the prompt.")
    ]
    warnings: list[str]
    seed: int
    steps: int
    guidance: float
    family: str
    parameters: int
    input_shape: Annotated[
        list[int], Field(description="C, H, W; of images of any size the centre square is resized.")
    ]
    checkpoint: Annotated[str, Field(description="sha256 of the checkpoint's manifest.")]
    links: Annotated[dict[str, str], Field(description="Paths of safetensors, onnx and predict.")]


class PredictRequest(_Request):
    """Pictures to classify."""

    images: Annotated[list[Image], Field(min_length=1, max_length=MAX_IMAGES)]


class Prediction(_Schema):
    """Of one picture."""

    label: Annotated[str, Field(description="The most probable class.")]
    probabilities: Annotated[list[float], Field(description="In the order of the classes.")]


class PredictReply(_Schema):
    """Of all pictures, in their order."""

    classes: list[str]
    predictions: list[Prediction]


class Limits(_Schema):
    """What a request may hold; more is answered with 413 or 422."""

    classes: int
    characters: int = MAX_CHARACTERS
    words: int = MAX_WORDS
    images: int = MAX_IMAGES
    image_bytes: int = MAX_IMAGE_BYTES
    image_pixels: int = MAX_PIXELS
    request_pixels: int = MAX_REQUEST_PIXELS
    body_bytes: int = MAX_BODY_BYTES
    steps: int = MAX_STEPS


class Info(_Schema):
    """What is served."""

    version: str
    checkpoint: Annotated[str, Field(description="sha256 of the checkpoint's manifest.")]
    families: list[str]
    dataset: str
    classes: Annotated[list[str], Field(description="Names that it, or its trunk, was trained on.")]
    encoder: Annotated[str, Field(description="What turns words into conditions.")]
    semantic: Annotated[bool, Field(description="Whether related words have related vectors.")]
    free_text: Annotated[bool, Field(description="Whether it takes words that it does not know.")]
    steps: Annotated[int, Field(description="Denoising steps where a request names none.")]
    guidance: float
    familiarity_threshold: float
    limits: Limits
    licences: Annotated[dict[str, str], Field(description="SPDX names.")]


class Fault(_Schema):
    """What is wrong with one part of a request."""

    field: Annotated[str, Field(description="Such as classes[2]; empty for the whole.")]
    detail: str


class ProblemDocument(_Schema):
    """An error as RFC 9457 has it; `type` is stable."""

    type: str
    title: str
    status: int
    detail: str = ""
    instance: Annotated[str, Field(description="The request's id, as in the server's log.")] = ""
    errors: list[Fault] = []
