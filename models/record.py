"""The frozen record that every declaration in a stage file is made of."""

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, model_validator


class Record(BaseModel):
    """Immutable, keyword-only, validated when it is made; an unknown field is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, arbitrary_types_allowed=False
    )

    @model_validator(mode="before")
    @classmethod
    def _lists_are_tuples(cls, fields: object) -> object:
        """A list may stand wherever a tuple is meant; records hold tuples, which cannot change."""
        if not isinstance(fields, dict):
            return fields
        return {name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()}

    def replace(self, **changes: Any) -> Self:  # Any: whatever the fields take; validated below
        """The same record with some fields changed, validated again; defaults stay defaults."""
        fields = {name: getattr(self, name) for name in self.model_fields_set}
        return type(self)(**{**fields, **changes})
