"""What the contract kits share: a component by whatever names it, the promises it keeps, and those it breaks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from orchestrator import registry
from orchestrator.errors import UsageError
from orchestrator.plan.identity import digest
from orchestrator.spec.base import Component
from orchestrator.spec.checks.places import implementation_error

SpecType = TypeVar("SpecType", bound=Component)
Reference = Component | type[Component] | Mapping[str, Any] | str | Path
"""A component: a spec, a spec class, a mapping with a `kind`, or a plug-in file that defines one of its sort."""


class Broken(AssertionError):
    """A promise that does not hold; the message says what was found and what to do."""


class ContractError(AssertionError):
    """A component breaks its contract; the message lists every promise it breaks.

    Attributes:
        broken: A line a promise: what was promised, what was found, what to do.
    """

    def __init__(self, component: str, broken: Sequence[str]) -> None:
        count = f"{len(broken)} promise{'s' if len(broken) > 1 else ''}"
        super().__init__("\n  ".join([f"{component} breaks {count} of its contract:", *broken]))
        self.broken = tuple(broken)


@dataclass(frozen=True)
class ContractReport:
    """What a contract kit found of a component that keeps its contract.

    Attributes:
        component: Its `kind`.
        held: The promises that were checked and hold.
        skipped: Those that could not be checked, and why.
    """

    component: str
    held: tuple[str, ...]
    skipped: tuple[str, ...] = ()

    @property
    def lines(self) -> tuple[str, ...]:
        """A line each of what was checked, and of what could not be."""
        return (*(f"holds: {promise}" for promise in self.held), *(f"not checked: {one}" for one in self.skipped))

    def __str__(self) -> str:
        return "\n  ".join([f"{self.component}:", *self.lines])


@dataclass
class Contract:
    """Collects the promises of one component that hold, that are broken, and that cannot be checked."""

    component: str
    held: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    @contextmanager
    def promise(self, text: str) -> Iterator[None]:
        """Check one promise within the block, which raises `Broken` where it does not hold."""
        try:
            yield
        except Broken as error:
            self.broken.append(f"{text}: {error}")
        except Exception as error:
            self.broken.append(f"{text}: it raised {type(error).__name__}: {error}")
        else:
            self.held.append(text)

    def report(self) -> ContractReport:
        """Return what holds.

        Raises:
            ContractError: a promise is broken.
        """
        if self.broken:
            raise ContractError(self.component, self.broken)
        return ContractReport(self.component, tuple(self.held), tuple(self.skipped))


def component_of(
    reference: Reference, base: type[SpecType], kit: str, defaults: Mapping[str, Any] | None = None
) -> SpecType:
    """Return the spec that a reference means.

    A class's required fields take the first of their `Field(examples=[...])`.

    Args:
        reference: A spec, a spec class, a mapping with a `kind`, or a plug-in file.
        base: The base class of its sort.
        kit: Name of the kit, for messages.
        defaults: Values of required fields that the kit knows itself.

    Raises:
        UsageError: it is no such component, or a required field has no value.
    """
    given: dict[str, Any] = {}
    if isinstance(reference, base):
        return reference
    if isinstance(reference, str | Path):
        cls = registry.only_component(Path(reference), base.registry_group)
    elif isinstance(reference, Mapping):
        given = dict(reference)
        cls = class_of_kind(given.get("kind"), base, kit)
    elif isinstance(reference, type) and issubclass(reference, base):
        cls = reference
    else:
        raise UsageError(f"{kit}: {reference!r} is no {base.__name__}, mapping with a `kind`, or plug-in file")
    refuse_unfinished(cls, kit)
    values = {"kind": cls.kind_name(), **example_of(cls), **(defaults or {}), **given}
    missing = sorted(name for name, one in cls.model_fields.items() if one.is_required() and name not in values)
    if missing:
        first = missing[0]
        raise UsageError(
            f"{kit}: {values['kind']} requires {', '.join(missing)}; give values "
            f"(--set {values['kind']}.{first}=VALUE, in Python a mapping), or write "
            f"`{first}: Annotated[TYPE, Field(examples=[VALUE])]` in {cls.__name__}, which the kit then uses"
        )
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}".removeprefix(": ") for one in error.errors()]
        raise UsageError(f"{kit}: {values!r} is no {values['kind']}: {'; '.join(faults)}") from error


def class_of_kind(kind: Any, base: type[SpecType], kit: str) -> type[SpecType]:
    """Return the spec class of a registered kind.

    Raises:
        UsageError: no component of this sort has that kind.
    """
    group = base.registry_group
    known = registry.kinds(group)
    if kind not in known:
        raise UsageError(f"{kit}: no kind {kind!r} is registered in {group}; known: {', '.join(known)}")
    found: type[SpecType] = registry.spec_class(group, kind)
    return found


def refuse_unfinished(cls: type[Component], kit: str) -> None:
    """Refuse a class that no spec can be made of.

    Raises:
        UsageError: it has no `kind`, or lacks what its base class leaves to it.
    """
    if not isinstance(cls.model_fields["kind"].default, str):
        raise UsageError(f'{kit}: {cls.__name__} has no kind; write `kind: Literal["NAME"] = "NAME"` in it')
    if missing := sorted(getattr(cls, "__abstractmethods__", ())):
        raise UsageError(f"{kit}: {cls.__name__} lacks {', '.join(missing)}; its base class says what it is")


def example_of(cls: type[Component]) -> dict[str, Any]:
    """Return the first example of each required field that has one."""
    fields = cls.model_fields.items()
    return {name: one.examples[0] for name, one in fields if one.is_required() and one.examples}


def check_spec(contract: Contract, spec: Component, methods: Sequence[str] = ()) -> None:
    """Check what the specs of all sorts promise: a description, an identity, an implementation.

    Args:
        contract: Takes the results.
        spec: The spec.
        methods: What its implementation must have; none for a sort without implementations.
    """
    cls = type(spec)
    with contract.promise("its class has a docstring, whose first line `llavolta components` shows"):
        if not (cls.__doc__ or "").strip():
            raise Broken(f"{cls.__name__} has none; say in one line what it does")
    with contract.promise("class attributes name fields that exist"):
        named = {*cls.path_fields, *cls.not_identity}
        if unknown := sorted(named - set(cls.model_fields)):
            raise Broken(f"path_fields and not_identity name {', '.join(unknown)}, which {cls.__name__} has not")
    with contract.promise("its values are JSON, and made again from them it is the same"):
        values = spec.model_dump(mode="json")
        again = cls.model_validate(values)
        if again != spec or digest(again.model_dump(mode="json")) != digest(values):
            raise Broken(
                f"{values} becomes {again.model_dump(mode='json')}; a validator changes values that it made itself, "
                "so that the identity of a cell would move"
            )
    if methods:
        with contract.promise(f"its implementation exists and has {', '.join(methods)}"):
            if wrong := implementation_error(cls, tuple(methods)):
                raise Broken(f"{wrong}; set `implementation: ClassVar[str]` to `module:Class`")
            found = registry.load_object(cls.implementation)
            if lacking := [name for name in methods if not callable(getattr(found, name, None))]:
                raise Broken(f"{cls.implementation} has no {', '.join(lacking)}")


def shorten(value: Any) -> str:
    """Return a value as messages show it."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
