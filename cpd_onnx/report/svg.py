"""SVG written by matplotlib, adapted for embedding in a page beside other figures.

It scales with its container, has a label for screen readers, uses the page's font and colours, and its identifiers are
unique within the page.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from xml.etree import ElementTree

_NAMESPACE = re.compile(r"^\{[^}]*\}")
_REFERENCE = re.compile(r"url\(#([^)]*)\)")
_LONG_NUMBER = re.compile(r"-?\d+\.\d{3,}")
_FONT = re.compile(r"(?:.*\b(?P<weight>bold|[1-9]00)\b)?.*?(?P<size>[\d.]+px)\b")
_DRAWN = ("d", "x", "y", "transform", "points")
"""Attributes that hold coordinates, which are rounded to hundredths of a point."""
_JOINS = "stroke-linejoin: round; stroke-linecap: butt"
"""Style of line ends and joins, which matplotlib puts into a style sheet that would apply to the whole page."""
_HEAD = ("width", "height", "version")
"""Attributes of the root element that are removed, so that the container determines the size."""


def embedded(text: str, key: str, label: str, inks: Mapping[str, str]) -> str:
    """Return the figure as an SVG element for an HTML page.

    Args:
        text: SVG document written by matplotlib.
        key: Prefix of its identifiers, unique within the page.
        label: Description for screen readers.
        inks: Names of the CSS variables that replace colours, by the colour as "#rrggbb".

    """
    root = ElementTree.fromstring(text)  # drops comments
    for element in root.iter():
        _simplify(element, inks)
    _rename(root, key)
    for parent in list(root.iter()):
        for child in [child for child in parent if child.tag in ("metadata", "style")]:
            parent.remove(child)
    width = float(root.get("viewBox", "0 0 0 0").split()[2]) * 4 / 3  # points to pixels
    for name in _HEAD:
        root.attrib.pop(name, None)
    root.attrib |= {"role": "img", "aria-label": label, "style": f"max-width: {width:.0f}px; {_JOINS}"}
    return ElementTree.tostring(root, encoding="unicode")


def _simplify(element: ElementTree.Element, inks: Mapping[str, str]) -> None:
    element.tag = _NAMESPACE.sub("", element.tag)
    element.text, element.tail = (part if part and part.strip() else None for part in (element.text, element.tail))
    for name in list(element.attrib):
        value = element.attrib.pop(name)
        plain = _NAMESPACE.sub("", name)
        if plain in _DRAWN:
            value = _LONG_NUMBER.sub(lambda found: f"{float(found[0]):.2f}".rstrip("0").rstrip("."), value)
            value = " ".join(value.split())
        if plain == "style":
            value = "; ".join(_styles(value, inks))
        element.attrib[plain] = value


def _styles(text: str, inks: Mapping[str, str]) -> Iterator[str]:
    """Yield the declarations of a style, without the font family and with the page's colours."""
    for declaration in filter(None, (part.strip() for part in text.split(";"))):
        name, _, value = (part.strip() for part in declaration.partition(":"))
        if name == "font" and (found := _FONT.match(value)):
            yield f"font-size: {found['size']}"
            if found["weight"]:
                yield f"font-weight: {found['weight']}"
        elif name != "font-family":
            yield f"{name}: var({inks[value]}, {value})" if value in inks else f"{name}: {value}"


def _rename(root: ElementTree.Element, key: str) -> None:
    """Prefix the identifiers with the figure's key, and drop those without references."""
    used = {target for element in root.iter() for target in _targets(element)}
    names = {old: f"{key}-{number}" for number, old in enumerate(sorted(used))}
    for element in root.iter():
        for name, value in element.attrib.items():
            if name == "href" and value.startswith("#"):
                element.attrib[name] = f"#{names[value[1:]]}"
            elif "url(#" in value:
                element.attrib[name] = _REFERENCE.sub(lambda found: f"url(#{names[found[1]]})", value)
        if (old := element.attrib.pop("id", None)) in names:
            element.attrib["id"] = names[old]


def _targets(element: ElementTree.Element) -> Iterator[str]:
    for name, value in element.attrib.items():
        if name == "href" and value.startswith("#"):
            yield value[1:]
        yield from _REFERENCE.findall(value)
