"""What the pages have in common: one file without any other, pictures embedded, text escaped."""

from __future__ import annotations

import base64
import io
from html import escape

from orchestrator.data.records.image_files import BadImage, open_image

THUMBNAIL_PIXELS = 180
_STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; color: #1f2328; background: #fff; margin: 24px; }
h1 { font-size: 20px; margin: 0 0 4px; } .muted { color: #656d76; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(210px, 1fr)); gap: 12px; margin-top: 16px; }
.card { border: 1px solid #d0d7de; border-radius: 6px; padding: 10px; overflow-wrap: anywhere; }
.wrong { border-color: #c0392b; box-shadow: inset 4px 0 #c0392b; } .wrong .answer { color: #c0392b; font-weight: 600; }
#only-wrong:checked ~ .grid .card:not(.wrong) { display: none; }
img { max-width: 100%; display: block; margin: 0 auto 8px; }
.missing { background: #f6f8fa; color: #656d76; padding: 24px 8px; text-align: center; margin-bottom: 8px; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f8fa; border-radius: 6px; padding: 12px; }
mark { background: #b7e4c7; } .visual { color: #8250df; }
table { border-collapse: collapse; } td { vertical-align: top; padding: 0 12px 0 0; } td:first-child { color: #656d76; }
"""


def page(title: str, body: str) -> str:
    """Return a document that needs no other file."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n<h1>{escape(title)}</h1>\n{body}\n</body></html>\n"
    )


def picture(path: str, pixels: int = THUMBNAIL_PIXELS) -> str:
    """Return an image element that holds a picture, at most `pixels` wide and high; words where it cannot be read."""
    try:
        image = open_image(path)
    except (BadImage, OSError) as error:
        return f'<div class="missing">{escape(path)} {escape(str(error))}</div>'
    image.thumbnail((pixels, pixels))
    data = io.BytesIO()
    image.save(data, "JPEG", quality=85)
    code = base64.b64encode(data.getvalue()).decode()
    return f'<img src="data:image/jpeg;base64,{code}" alt="{escape(path)}" title="{escape(path)}">'


def values_table(values: dict[str, tuple[str, str]]) -> str:
    """Return a table of name to (value, CSS class)."""
    rows = (
        f'<tr><td>{escape(name)}</td><td class="{kind}">{escape(text)}</td></tr>'
        for name, (text, kind) in values.items()
    )
    return f"<table>{''.join(rows)}</table>"
