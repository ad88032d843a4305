"""The base classes of JSON documents.

Their keys are a contract with users: `requant schema` prints the documents of all commands.
"""

from __future__ import annotations

import math
from collections.abc import Sized
from typing import Annotated, Any, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    PlainSerializer,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

from requant.tasks.errors import StoreError


def finite_or_none(value: float | None) -> float | None:
    """Return a value as JSON has it, which has no NaN and no infinity."""
    return value if value is not None and math.isfinite(value) else None


# A measured value, which is null in JSON if it is not finite.
Value = Annotated[float, PlainSerializer(finite_or_none, return_type=float | None)]
Model = TypeVar("Model", bound=BaseModel)


def is_none(value: object) -> bool:
    """Check whether a field is None, for the fields that are absent then (`exclude_if`)."""
    return value is None


def is_empty(value: Sized) -> bool:
    """Check whether a list is empty, for the fields that are absent then (`exclude_if`)."""
    return not value


def first_problem(error: ValidationError) -> tuple[str, str]:
    """Return the place of the first problem, which is empty for the document as a whole, and what is wrong there."""
    problem = error.errors(include_url=False, include_input=False)[0]
    return ".".join(map(str, problem["loc"])), problem["msg"]


def read_stored(kind: type[Model], document: bytes, what: str) -> Model:
    """Read a document of the store. Raises StoreError, with `what` it is, if its content cannot be read."""
    try:
        return kind.model_validate_json(document)
    except ValidationError as error:
        place, problem = first_problem(error)
        raise StoreError(
            f"{what} cannot be read ({place or 'the document'}: {problem}): "
            "use the version of Requant that wrote it, or another store"
        ) from error


class Document(BaseModel):
    """A document that Requant writes, or a part of one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def to_json(self) -> dict[str, Any]:
        """Return the document as `json.dumps` takes it."""
        return self.model_dump(mode="json")


class StoredDocument(Document):
    """A document that other versions of Requant read and write.

    Keys that are unknown are ignored. A field that was not set is left out, also where the document is a part of
    another: a key that is absent has no meaning for what was measured, and one that is null has no value.
    """

    # A measured value can be infinite or NaN, which must not become null: that means not measured.
    model_config = ConfigDict(extra="ignore", ser_json_inf_nan="constants")

    # The method has no return type, since pydantic would take it for the schema of the document.
    @model_serializer(mode="wrap")
    def _leave_out_unset(self, serialize: SerializerFunctionWrapHandler):  # type: ignore[no-untyped-def]
        return {key: value for key, value in serialize(self).items() if key in self.model_fields_set}
