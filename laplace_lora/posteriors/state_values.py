"""Attributes of a posterior that are numbers of its frozen state: setting one makes a new state."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Generic, Protocol, TypeVar, overload

from torch import Tensor

from laplace_lora.structures.state import PosteriorState

T = TypeVar("T")


class HasState(Protocol):
    """An object that holds a posterior's state."""

    state: PosteriorState


class StateValue(Generic[T]):
    """A number of the state, such as ``loss``."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, instance: None, owner: type) -> StateValue[T]: ...

    @overload
    def __get__(self, instance: HasState, owner: type) -> T: ...

    def __get__(self, instance: HasState | None, owner: type) -> Any:
        return self if instance is None else getattr(instance.state, self.name)

    def __set__(self, instance: HasState, value: T) -> None:
        changes: dict[str, Any] = {self.name: value}
        instance.state = replace(instance.state, **changes)


class SettingValue(StateValue[T]):
    """A setting, such as ``covariance_scale``; laplace-torch's own have an underscore before."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name.removeprefix("_")

    def __get__(self, instance: HasState | None, owner: type) -> Any:
        return self if instance is None else getattr(instance.state.settings, self.name)

    def __set__(self, instance: HasState, value: T) -> None:
        changes: dict[str, Any] = {self.name: own(value)}
        settings = replace(instance.state.settings, **changes)
        instance.state = instance.state.with_settings(settings)


def own(value: Any) -> Any:
    """Return a copy of a tensor, which its owner may change in place; gradients flow through."""
    return value.clone() if isinstance(value, Tensor) else value
