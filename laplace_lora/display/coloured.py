"""Texts coloured by how unsure the posterior is of each token, as HTML and as rich prints them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

COLOUR = "214, 90, 49"  # red, green, blue of the ground under the most uncertain token
STRONG = "black on #d65a31"  # as the ground of the most uncertain token in HTML
NO_TEXT = "·"  # so that the colour of a token that completes no character can be seen
GROUNDS = ((0.75, STRONG), (0.5, "black on #e58b6d"), (0.25, "black on #f2c4b5"))


def coloured_text(texts: Sequence[Mapping[str, Any]], title: str) -> RenderableType:
    """Return a line per text, its tokens on grounds that grow stronger with their uncertainty.

    Args:
        texts: With ``tokens`` each, as `TokenPredictions.to_dict` lists them.
        title: Stands above.
    """
    from rich.console import Group
    from rich.text import Text

    largest = _largest(texts)
    lines = [Text(title, style="italic")]
    for text in texts:
        line = Text()
        for token in text["tokens"]:
            _append(line, token, largest)
        lines.append(line)
    return Group(*lines)


def _append(line: Text, token: Mapping[str, Any], largest: float) -> None:
    share = token["mutual_information"] / largest
    style = next((style for least, style in GROUNDS if share >= least), "")
    if "text" in token:
        line.append(token["text"] or NO_TEXT, style)
    else:
        line.append(str(token["token"]), style).append(" ")


def coloured_html(texts: Sequence[Mapping[str, Any]], title: str) -> str:
    """Return a paragraph per text, its tokens on grounds that darken with their uncertainty.

    Args:
        texts: With ``tokens`` each, as `TokenPredictions.to_dict` lists them.
        title: Stands above.
    """
    largest = _largest(texts)
    paragraphs = [
        f"<p>{''.join(_in_html(token, largest) for token in text['tokens'])}</p>" for text in texts
    ]
    return f"<div><p><i>{escape(title)}</i></p>{''.join(paragraphs)}</div>"


def _in_html(token: Mapping[str, Any], largest: float) -> str:
    strength = 0.8 * max(token["mutual_information"], 0) / largest
    shown = (token["text"] or NO_TEXT) if "text" in token else f"{token['token']} "
    told = (
        f"probability {token['prob']:.3g} (MAP {token['map_prob']:.3g}), entropy "
        f"{token['entropy']:.3g}, epistemic {token['mutual_information']:.3g} nats"
    )
    style = f"background: rgba({COLOUR}, {strength:.2f}); white-space: pre-wrap"
    return f'<span style="{style}" title="{escape(told)}">{escape(shown)}</span>'


def _largest(texts: Sequence[Mapping[str, Any]]) -> float:
    values = [token["mutual_information"] for text in texts for token in text["tokens"]]
    largest: float = max([*values, 1e-12])
    return largest
