"""Attributes of a posterior that are numbers of its frozen state: setting one makes a new state."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Generic, TypeVar, cast

T = TypeVar("T")


class StateValue(Generic[T]):
    """A number of the state, such as ``loss``, of an object that has one as its ``state``."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type) -> T:
        return cast("T", self if instance is None else getattr(instance.state, self.name))

    def __set__(self, instance: Any, value: T) -> None:
        instance.state = replace(instance.state, **{self.name: value})


class SettingValue(StateValue[T]):
    """A setting, such as ``covariance_scale``; laplace-torch's own have an underscore before."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name.removeprefix("_")

    def __get__(self, instance: Any, owner: type) -> T:
        return cast("T", self if instance is None else getattr(instance.state.settings, self.name))

    def __set__(self, instance: Any, value: T) -> None:
        settings = instance.state.settings.with_value(self.name, value)
        instance.state = instance.state.with_settings(settings)
