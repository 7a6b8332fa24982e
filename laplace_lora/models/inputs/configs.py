"""What a model's configuration says of its texts."""

from __future__ import annotations

from typing import Any


def text_config(config: Any) -> Any:
    """Return the part of a configuration that is about texts, for models of other inputs as well.

    Args:
        config: A transformer's configuration, or anything else, which is returned as it is.
    """
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def longest_text(config: Any) -> int | None:
    """Return how many tokens a configuration allows a text, ``None`` if it does not say.

    Args:
        config: As for `text_config`.
    """
    return getattr(text_config(config), "max_position_embeddings", None)
