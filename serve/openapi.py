"""The OpenAPI document: bodies by media type and problems, which FastAPI cannot derive."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from serve.bodies import JSON, MULTIPART
from serve.problems import KINDS, MEDIA_TYPE
from tina.schemas import MAX_IMAGES, MEDIA_TYPES, ModelRequest, PredictRequest, ProblemDocument

REF = "#/components/schemas/{model}"
BINARY = {"type": "string", "format": "binary"}
WEIGHTS = {media: {"schema": BINARY} for media in (MEDIA_TYPES["safetensors"], MEDIA_TYPES["onnx"])}


def _body(schema: type, form: dict[str, Any]) -> dict[str, Any]:
    content = {
        JSON: {"schema": {"$ref": REF.format(model=schema.__name__)}},
        MULTIPART: {"schema": {"type": "object", **form}},
    }
    return {"requestBody": {"required": True, "content": content}}


PROMPT = _body(
    ModelRequest,
    {
        "description": "Pictures of class i come as file parts named images[i] or examples[i].",
        "properties": {"prompt": {"type": "string", "contentMediaType": JSON}},
        "required": ["prompt"],
        "additionalProperties": BINARY,
    },
)
FILES = {"type": "array", "items": BINARY, "minItems": 1, "maxItems": MAX_IMAGES}
PREDICTION = _body(
    PredictRequest,
    {"properties": {"images": FILES}, "required": ["images"], "additionalProperties": False},
)


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """An operation's problems; any may fail or be overloaded."""
    titles: dict[int, list[str]] = {}
    for status, title in KINDS.values():
        titles.setdefault(status, []).append(title)
    schema = {"$ref": REF.format(model=ProblemDocument.__name__)}
    return {
        status: {
            "description": "; ".join(titles[status]),
            "content": {MEDIA_TYPE: {"schema": schema}},
        }
        for status in (*statuses, 500, 503)
    }


def describe(app: FastAPI) -> None:
    """Let the application answer with the whole document."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            found = get_openapi(
                title="Tina",
                version=version("tina-text2model"),
                summary="Name the classes, get the trained weights.",
                routes=app.routes,
            )
            kinds = [(ModelRequest, "validation"), (PredictRequest, "validation")]
            kinds.append((ProblemDocument, "serialization"))
            _, schemas = models_json_schema(kinds, ref_template=REF)  # type: ignore[arg-type]
            found["components"]["schemas"] |= schemas["$defs"]
            app.openapi_schema = found
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]
