"""Texts as HTML, coloured by how unsure the posterior is of each token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from laplace_lora.display.terminal import NO_TEXT

COLOUR = "214, 90, 49"  # red, green, blue of the ground under the most uncertain token


def coloured_html(texts: Sequence[Mapping[str, Any]], title: str) -> str:
    """Return a paragraph per text, its tokens on grounds that darken with their uncertainty.

    Args:
        texts: With ``tokens`` each, as `TokenPredictions.to_dict` lists them.
        title: Stands above.
    """
    values = [token["mutual_information"] for text in texts for token in text["tokens"]]
    largest = max([*values, 1e-12])
    paragraphs = [
        f"<p>{''.join(_token(token, largest) for token in text['tokens'])}</p>" for text in texts
    ]
    return f"<div><p><i>{escape(title)}</i></p>{''.join(paragraphs)}</div>"


def _token(token: Mapping[str, Any], largest: float) -> str:
    strength = 0.8 * max(token["mutual_information"], 0) / largest
    shown = (token["text"] or NO_TEXT) if "text" in token else f"{token['token']} "
    told = (
        f"probability {token['prob']:.3g} (MAP {token['map_prob']:.3g}), entropy "
        f"{token['entropy']:.3g}, epistemic {token['mutual_information']:.3g} nats"
    )
    style = f"background: rgba({COLOUR}, {strength:.2f}); white-space: pre-wrap"
    return f'<span style="{style}" title="{escape(told)}">{escape(shown)}</span>'
