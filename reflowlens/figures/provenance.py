"""What made a figure, written into the files themselves, where the tools of each format look for it.

Each function takes a file as it was drawn and returns it with a title and facts (as JSON); the drawing stays the same.
"""

from __future__ import annotations

import json
import re
import struct
import zlib
from collections.abc import Mapping
from html import escape
from typing import Any

from reflowlens.errors import ReflowlensError

_PNG_HEAD = 8 + 25  # the signature and the IHDR chunk, behind which others may stand
_INCH = 0.0254


def html_with_metadata(page: str, title: str, facts: Mapping[str, Any]) -> str:
    """An HTML page with a ``<title>`` and ``<meta name="reflowlens" content="{...}">``."""
    tags = f'<title>{escape(title)}</title><meta name="reflowlens" content="{escape(_json(facts))}" />'
    return re.sub(r"<head>", lambda match: match[0] + tags, page, count=1)


def svg_with_metadata(svg: str, title: str, facts: Mapping[str, Any]) -> str:
    """An SVG whose first children are ``<title>`` and ``<metadata>``."""
    tags = f"<title>{escape(title)}</title>" if title else ""
    tags += f"<metadata>{escape(_json(facts), quote=False)}</metadata>"
    return re.sub(r"<svg[^>]*>", lambda match: match[0] + tags, svg, count=1)


def png_with_metadata(png: bytes, title: str, facts: Mapping[str, Any], dpi: float) -> bytes:
    """A PNG with its resolution and text chunks ``Title``, ``Software`` and ``reflowlens`` (PNG specification, 11.3).

    Raises:
        ReflowlensError: it is none.
    """
    if png[:8] != b"\x89PNG\r\n\x1a\n" or png[12:16] != b"IHDR":
        raise ReflowlensError("the browser did not draw a PNG")
    dots = round(dpi / _INCH)
    chunks = png_chunk(b"pHYs", struct.pack(">IIB", dots, dots, 1))
    for keyword, text in (("Title", title), ("Software", "reflowlens")):
        chunks += png_chunk(b"iTXt", keyword.encode() + b"\0\0\0\0\0" + text.encode()) if text else b""
    chunks += png_chunk(b"tEXt", b"reflowlens\0" + _json(facts).encode("ascii"))
    return png[:_PNG_HEAD] + chunks + png[_PNG_HEAD:]


def pdf_with_metadata(pdf: bytes, title: str, facts: Mapping[str, Any]) -> bytes:
    """A PDF with a document information of ``/Title``, ``/Creator``, ``/CreationDate`` and ``/reflowlens``.

    Appended as an incremental update (ISO 32000-1, 7.5.6): the file as it was drawn is its beginning.

    Raises:
        ReflowlensError: it has no plain table of its objects, as Chrome's have.
    """
    trailer = re.search(rb"trailer\s*<<(.*?)>>\s*startxref\s*(\d+)\s*%%EOF\s*$", pdf, re.DOTALL)
    size = trailer and re.search(rb"/Size (\d+)", trailer[1])
    root = trailer and re.search(rb"/Root (\d+ \d+ R)", trailer[1])
    if trailer is None or size is None or root is None:
        raise ReflowlensError("the browser did not draw a PDF that can be told its provenance")
    number, body = int(size[1]), pdf if pdf.endswith(b"\n") else pdf + b"\n"
    date = re.search(rb"/CreationDate \([^)]*\)", pdf)
    entries = [b"/Title " + _pdf_text(title)] if title else []
    entries += [b"/Creator (reflowlens)", b"/reflowlens " + _pdf_text(_json(facts)), *([date[0]] if date else [])]
    information = b"%d 0 obj\n<<%s>>\nendobj\n" % (number, b"\n".join(entries))
    table = b"xref\n%d 1\n%010d 00000 n \n" % (number, len(body))
    references = b"/Size %d /Root %s /Info %d 0 R /Prev %s" % (number + 1, root[1], number, trailer[2])
    place = len(body) + len(information)
    return body + information + table + b"trailer\n<<%s>>\nstartxref\n%d\n%%%%EOF\n" % (references, place)


def _json(facts: Mapping[str, Any]) -> str:
    """ASCII, since a tEXt chunk is Latin-1."""
    return json.dumps(facts)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    """One chunk of a PNG: length, kind, data and checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _pdf_text(text: str) -> bytes:
    """A text string: hexadecimal UTF-16 behind a byte-order mark, plain where it is ASCII."""
    if text.isascii():
        return b"(" + re.sub(r"([\\()])", r"\\\1", text).encode() + b")"
    return b"<FEFF" + text.encode("utf-16-be").hex().upper().encode() + b">"
