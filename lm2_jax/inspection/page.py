"""The page with the pictures of a memory trace: one HTML file that needs no network, fonts or other files."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence

import numpy as np

from lm2_jax.common.storage import AnyPath
from lm2_jax.inspection.pictures import HeatMap, Picture
from lm2_jax.inspection.reading import MemoryTrace

# The pointer over a heat map: the value under it.
_SCRIPT = """
for (const map of document.querySelectorAll(".map")) {
  const data = JSON.parse(map.dataset.values);
  const values = new Float32Array(Uint8Array.from(atob(data.float32), letter => letter.charCodeAt(0)).buffer);
  const note = map.closest("figure").querySelector(".note");
  const show = event => {
    const box = map.getBoundingClientRect(), rows = data.rows.length, columns = data.columns.length;
    const at = (place, size, count) => Math.max(0, Math.min(count - 1, Math.floor(place / size * count)));
    const r = at(event.clientY - box.top, box.height, rows), c = at(event.clientX - box.left, box.width, columns);
    note.textContent = `${data.unit}: ${data.rows[r]}, ${data.columns[c]}: ${values[r * columns + c].toPrecision(3)}`;
  };
  map.addEventListener("pointermove", show);
  map.addEventListener("pointerdown", show);
}
"""

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; padding: 1rem clamp(0.6rem, 2vw, 2rem); font: 16px/1.45 system-ui, sans-serif; color: #1b1f24;
  background: #fff; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: 0.4rem 0; }
h2 { font-size: 1.1rem; margin: 0 0 0.3rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.1rem 1rem; margin: 0.6rem 0 1rem; }
dt { color: #57606a; }
dd { margin: 0; }
main { columns: 27rem 3; column-gap: 2rem; }
section { break-inside: avoid; margin: 0 0 1.6rem; }
figure { margin: 0; }
.picture { position: relative; max-width: 720px; }
.picture img { width: 100%; height: auto; display: block; }
.map { position: absolute; cursor: crosshair; touch-action: pan-y; }
.note { min-height: 1.5em; font-size: 0.9rem; color: #0550ae; font-variant-numeric: tabular-nums; }
figcaption { color: #57606a; font-size: 0.9rem; }
.text { line-height: 2; }
.text span { padding: 0.15em 0.1em; border-radius: 3px; white-space: pre-wrap; }
.text .start { border-left: 3px solid #d97706; padding-left: 0.35em; margin-left: 0.2em; }
"""


def write_page(
    path: AnyPath,
    title: str,
    facts: Mapping[str, str],
    pictures: Sequence[tuple[Picture, bytes, Sequence[HeatMap]]],
    trace: MemoryTrace,
    words_K: Sequence[str],
) -> None:
    """Writes the page.

    Args:
      facts: name to value, above the pictures.
      pictures: each with its PNG and its heat maps.
      words_K: the last tokens as text, shown by how much of them was written.
    """
    rows = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in facts.items())
    sections = [_section(*one) for one in pictures]
    if trace.written_LK is not None:
        sections.insert(1, _text_section(trace, words_K))
    path.write_text(
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,">\n<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n'
        f"<body>\n<h1>{html.escape(title)}</h1>\n<dl>{rows}</dl>\n<main>\n{''.join(sections)}</main>\n"
        f"<script>{_SCRIPT}</script>\n</body>\n</html>\n",
        encoding="utf-8",
    )


def _section(picture: Picture, png: bytes, maps: Sequence[HeatMap]) -> str:
    overlays = "".join(_overlay(one) for one in maps)
    hint = " Point at it for values." if maps else ""
    note = '<div class="note" aria-live="polite"></div>' if maps else ""
    return (
        f"<section><h2>{html.escape(picture.title)}</h2><figure>"
        f'<div class="picture"><img alt="{html.escape(picture.title)}" '
        f'src="data:image/png;base64,{base64.b64encode(png).decode()}">{overlays}</div>'
        f"{note}<figcaption>{html.escape(picture.caption)}{hint}</figcaption></figure></section>\n"
    )


def _overlay(found: HeatMap) -> str:
    values = base64.b64encode(found.values_RC.astype("<f4").tobytes()).decode()
    data = {"unit": found.unit, "rows": list(found.row_names), "columns": list(found.column_names), "float32": values}
    left, top, width, height = (f"{100 * fraction:.3f}%" for fraction in found.box)
    return (
        f'<div class="map" style="left:{left};top:{top};width:{width};height:{height}" '
        f'data-values="{html.escape(json.dumps(data))}"></div>'
    )


def _text_section(trace: MemoryTrace, words_K: Sequence[str]) -> str:
    """The last tokens as running text; the deeper its colour, the more of a token is written."""
    written_K = trace.written_LK.mean(0)
    spans = []
    for position, (word, weight) in enumerate(zip(words_K, written_K, strict=True)):
        start = ' class="start"' if position in trace.segment_starts else ""
        most = ", ".join(str(slot) for slot in np.argsort(-trace.read_LKN[-1, position])[:3])
        spans.append(
            f'<span{start} style="background:rgba(217,119,6,{min(weight / 4, 1):.2f})" '
            f'title="written: {weight:.2f} of an even share; the last block reads slots {most}">'
            f"{html.escape(word)}</span>"
        )
    caption = (
        "The last tokens; the deeper the colour, the more of the slots' attention a token got when its segment was "
        "written (mean over blocks; full colour: four times an even share). A bar begins a segment."
    )
    return (
        f'<section><h2>What is written</h2><figure><div class="text">{"".join(spans)}</div>'
        f"<figcaption>{caption}</figcaption></figure></section>\n"
    )
