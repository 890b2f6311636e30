"""The form of published files as a JSON schema, for programs that read results without flowbench."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import create_model
from pydantic.json_schema import models_json_schema

from flowbench.published import FORMAT, Base
from flowbench.record import Record

# Where a record of a run has base and tuned scores and the prompts, the published one has the tuned scores and a name.
PublishedRecord = create_model(
    "PublishedRecord",
    __base__=Record,
    __doc__="A record in the published form; scores of the base model and prompts are in the file that `base` names.",
    format=(Literal[1], ...),
    base=(str | None, None),
    per_prompt=(dict[str, list[float]], {}),
    prompts=(dict[str, list[str]], {}),
)
assert FORMAT == 1  # the literal above


def schema_text() -> str:
    """The content of leaderboard/schema.json."""
    models: list[tuple[Any, Literal["validation"]]] = [(PublishedRecord, "validation"), (Base, "validation")]
    _, schema = models_json_schema(models, title="flowbench results", ref_template="#/$defs/{model}")
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "anyOf": [{"$ref": "#/$defs/PublishedRecord"}, {"$ref": "#/$defs/Base"}],
        **schema,
    }
    return json.dumps(schema, indent=1) + "\n"
