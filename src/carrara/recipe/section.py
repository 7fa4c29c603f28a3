"""What sections of a recipe are: typed to the leaf, described by their docstrings, and of several kinds where needed.

A section of several kinds is a discriminated union: its key `kind` selects the member, whose keys alone are taken.
`OneOf` annotates such a field. Its members may be registered later than the recipe's classes are made.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_type_hints

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    PydanticUserError,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    create_model,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from carrara.errors import UserError, nearest


class Section(BaseModel):
    """Typed data: an unknown key is refused, and nothing changes once it is read.

    The keys are described by the "Attributes" of the class's docstring, and of its `described_by`.
    """

    described_by: ClassVar[tuple[type, ...]] = ()
    decided: ClassVar[Collection[str]] = ()
    """Keys that the data and the rest of the recipe decide."""
    sparse: ClassVar[bool] = False
    """Whether a saved recipe has only the keys that were set: the others follow from elsewhere."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, json_schema_extra=lambda schema, kind: describe(schema, kind)
    )

    @field_validator("*", mode="before")
    @classmethod
    def _numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML reads yes and no as True and False, which would be 1 and 0."""
        field = cls.model_fields.get(info.field_name or "")
        leaves = _leaves(field.annotation) if field is not None else set()
        if isinstance(value, bool) and leaves & {int, float} and bool not in leaves:
            raise PydanticCustomError("invalid", "a number is needed, not yes or no")
        return value

    @model_validator(mode="before")
    @classmethod
    def _known(cls, data: Any) -> Any:
        """Raises ValidationError with the nearest key for each unknown one."""
        unknown = [key for key in data if key not in cls.model_fields] if isinstance(data, Mapping) else []
        for key in unknown:
            if key in cls.decided:
                raise refusal("conflict", key, "follows from the data and the rest of the recipe: leave it out.")
            raise refusal("unknown", key, nearest(str(key), cls.model_fields))
        return data

    @model_serializer(mode="wrap")
    def _saved(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        data: dict[str, Any] = dump(self)
        return {key: value for key, value in data.items() if key in self.model_fields_set} if self.sparse else data

    def given(self) -> dict[str, Any]:
        """The keys that were set, `kind` aside."""
        return {key: getattr(self, key) for key in type(self).model_fields if key in self.model_fields_set - {"kind"}}


def _leaves(annotation: Any) -> set[Any]:
    """The types that an annotation is made of."""
    parts = get_args(annotation)
    return {annotation} if not parts else set().union(*(_leaves(part) for part in parts))


Refused = Literal["unknown", "unknown_value", "conflict"]


def refusal(kind: Refused, key: str, reason: str, value: Any = None) -> ValidationError:
    """The error of one key of a section: it is unknown, of an unknown value, or decided elsewhere."""
    error = PydanticCustomError(kind, "{reason}", {"reason": reason})
    return ValidationError.from_exception_data("recipe", [{"type": error, "loc": (key,), "input": value}])


# ---- sections of several kinds -------------------------------------------------------------------------------------

Members = Mapping[str, type[Section]]
S = TypeVar("S", bound=Section)


def kind_given(data: Mapping[str, Any]) -> str | None:
    """The value of `kind`, where there is one."""
    return data.get("kind")


@dataclasses.dataclass(frozen=True)
class OneOf:
    """Annotates a field: a section of one of several kinds.

    Args:
        members: the class of each kind, looked up at every validation.
        default: the kind where none is given.
        kind: the kind that a section's data are of; None: the default.
        prepare: changes data of a class before they are validated (those that earlier versions saved).
    """

    members: Callable[[], Members]
    default: str
    kind: Callable[[Mapping[str, Any]], str | None] = kind_given
    prepare: Callable[[Mapping[str, Any], type[Section]], Mapping[str, Any]] = lambda data, _: data

    @classmethod
    def of(cls, union: Any) -> OneOf:
        """Of the members of a union of sections, each with a literal `kind`, the default's first."""
        members = {get_args(member.model_fields["kind"].annotation)[0]: member for member in get_args(union)}
        return cls(lambda: members, next(iter(members)))

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        serialize = core_schema.plain_serializer_function_ser_schema(self._dump, info_arg=True)
        return core_schema.no_info_plain_validator_function(self.validate, serialization=serialize)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        members = [handler(member.__pydantic_core_schema__) for member in self.members().values()]
        return {"oneOf": members, "discriminator": {"propertyName": "kind"}}

    def validate(self, value: Any) -> Section:
        """The section of some data.

        Raises:
            ValidationError: no mapping, an unknown kind, or what its class refuses.
        """
        members = self.members()
        if isinstance(value, Section) and type(value) in members.values():
            return value
        if not isinstance(value, Mapping):
            raise PydanticCustomError("invalid", "a section of keys is needed")
        kind = self.kind(value) or self.default
        if kind not in members:
            raise refusal("unknown_value", "kind", nearest(str(kind), members), kind)
        member = members[kind]
        data = self.prepare({key: item for key, item in value.items() if key != "kind" or item is not None}, member)
        for key in data:
            owners = [name for name, other in members.items() if key in other.model_fields]
            if key not in member.model_fields and owners:
                raise refusal("unknown", key, f"it is for kind {' or '.join(owners)}, not for {kind}.")
        return member.model_validate(data)

    def _dump(self, value: Section, info: SerializationInfo) -> dict[str, Any]:
        return value.model_dump(
            mode=info.mode,
            exclude_none=info.exclude_none,
            exclude_defaults=info.exclude_defaults,
            exclude_unset=info.exclude_unset,
        )


def section_from(
    kind: str | None,
    *sources: type,
    base: type[S] = Section,  # type: ignore[assignment]
    optional_kind: bool = False,
    decided: Collection[str] = (),
    without: Collection[str] = (),
    **more: Any,
) -> type[S]:
    """The section of a kind whose keys are the fields of dataclasses.

    Args:
        kind: the value of its key `kind`; None has no such key.
        sources: dataclasses of plain data; their docstrings describe the keys.
        base: the class to derive it from.
        optional_kind: `kind` may be left out.
        decided: fields that the data and the rest of the recipe decide.
        without: fields that no recipe sets.
        more: further fields, each its type and default.

    Raises:
        UserError: a field of a type that no recipe can contain.
    """
    fields: dict[str, Any] = {} if kind is None else {"kind": (Literal[kind], kind if optional_kind else ...)}
    words = re.split(r"\W|_", kind or sources[0].__name__.removesuffix("Params"))
    name = "".join(word[:1].upper() + word[1:] for word in words) + base.__name__
    try:
        for source in sources:
            hints = get_type_hints(source)
            for field in dataclasses.fields(source):
                if field.init and field.name not in {*decided, *without}:
                    fields[field.name] = (hints[field.name], _default(field))
        section: type[S] = create_model(name, __base__=base, __doc__=inspect.getdoc(base), **fields, **more)
    except (PydanticUserError, NameError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"the settings of kind '{kind}' cannot be keys of a recipe ({reason}): annotate plain data.",
            key=kind or name,
            code="unsupported",
        ) from None
    section.described_by, section.decided = sources, decided
    return section


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return Field(default_factory=field.default_factory)
    return ... if field.default is dataclasses.MISSING else field.default


# ---- descriptions --------------------------------------------------------------------------------------------------


def describe(schema: dict[str, Any], kind: type[Section]) -> None:
    """Put the docstrings' descriptions of the keys into a JSON schema."""
    about = {name: text for source in (*kind.described_by, kind) for name, text in _attributes(source)}
    about.setdefault("kind", "which of the kinds this section is of.")
    for name, entry in schema.get("properties", {}).items():
        entry.pop("title", None)
        if name in about:
            entry["description"] = about[name]
    if kind.sparse:  # their defaults follow from elsewhere
        for name, entry in schema.get("properties", {}).items():
            if name != "kind":
                entry.pop("default", None)
    schema["description"] = (inspect.getdoc(kind) or "").partition("\n\n")[0].replace("\n", " ")


def _attributes(kind: type) -> Iterator[tuple[str, str]]:
    """Name and text of what the docstrings of a class and its bases list under "Attributes"."""
    for base in reversed(kind.__mro__):
        _, _, body = inspect.cleandoc(vars(base).get("__doc__") or "").partition("Attributes:\n")
        for entry in re.split(r"\n(?=    \S|\S)", body):
            names, colon, text = entry.strip().partition(": ")
            if entry.startswith("    ") and colon:
                yield from ((name, " ".join(text.split())) for name in names.split(", "))
