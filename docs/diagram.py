"""Draw docs/method.svg: how a photo and a prompt go through MoA.

    python docs/diagram.py
"""
from html import escape
from pathlib import Path

FROZEN, TRAINED, PLAIN = "#e4e8ee", "#ffdf80", "none"
WIDTH, HEIGHT = 1000, 560
# x, y, width, height, colour, lines of text
BOXES = {
    "photo": (20, 66, 120, 44, PLAIN, ["photo"]),
    "prompt": (20, 186, 120, 44, PLAIN, ["prompt"]),
    "image": (185, 56, 170, 64, FROZEN, ["CLIPImageEncoder"]),
    "text": (185, 176, 170, 64, FROZEN, ["CLIPTextEncoder"]),
    "multi": (445, 56, 210, 64, TRAINED, ["MultimodalPrompt", "Eq. 8, Fig. 5"]),
    "z": (40, 400, 110, 44, PLAIN, ["Z (B, N, D)"]),
    "prior": (445, 306, 210, 64, FROZEN, ["prior: CrossAttention", "Eq. 1-3"]),
    "personalized": (445, 386, 210, 64, TRAINED, ["personalized: CrossAttention", "Eq. 1-3"]),
    "router": (445, 466, 210, 64, TRAINED, ["Router", "Eq. 5, 7"]),
    "mix": (760, 376, 120, 84, PLAIN, ["R₀ · prior", "+ R₁ · pers.", "Eq. 4, 6"]),
    "out": (910, 396, 70, 44, PLAIN, ["Z′"]),
}
# Corners of each arrow, its label and where that stands
ARROWS = [
    ([(140, 88), (185, 88)], "", (0, 0)), ([(140, 208), (185, 208)], "", (0, 0)),
    ([(355, 88), (445, 88)], "f (B, S, F)", (363, 80)),
    ([(355, 208), (400, 208), (400, 104), (445, 104)], "T (B, 77, C)", (408, 170)),
    ([(550, 30), (550, 56)], "t, l = 0 ... L-1", (562, 34)),
    ([(400, 208), (400, 322), (445, 322)], "", (0, 0)),
    ([(655, 88), (700, 88), (700, 250), (425, 250), (425, 402), (445, 402)],
     "(L, B, 77, C), of which a layer takes its own [l]", (436, 243)),
    ([(150, 422), (345, 422), (345, 354), (445, 354)], "", (0, 0)),
    ([(150, 422), (445, 422)], "", (0, 0)),
    ([(345, 422), (345, 498), (445, 498)], "", (0, 0)),
    ([(655, 338), (710, 338), (710, 396), (760, 396)], "(B, N, D)", (660, 330)),
    ([(655, 418), (760, 418)], "(B, N, D)", (660, 411)),
    ([(655, 498), (710, 498), (710, 440), (760, 440)], "R (B, N, 2)", (660, 516)),
    ([(880, 418), (910, 418)], "", (0, 0)),
]


def text(x: float, y: float, line: str, size: int = 14, more: str = "") -> str:
    return f'<text x="{x}" y="{y}" font-size="{size}" {more}>{escape(line)}</text>'


def draw() -> str:
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
             'font-family="Helvetica, Arial, sans-serif" fill="#222">',
             '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
             'orient="auto"><path d="M0 0 8 4 0 8z" fill="#555"/></marker></defs>',
             f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="#fff"/>',
             '<rect x="20" y="272" width="875" height="272" rx="8" fill="none" stroke="#999" '
             'stroke-dasharray="6 4"/>',
             text(32, 296, "MixtureOfAttention: one in place of each", 14, 'font-weight="bold"'),
             text(32, 316, "attention of the UNet (Fig. 2 and 4)", 14, 'font-weight="bold"'),
             text(32, 338, "cross-attention as drawn; in self-", 13),
             text(32, 356, "attention both experts attend to Z", 13),
             text(20, 34, "the encoders: once per picture; the prompt: at each t", 14, 'font-weight="bold"')]
    for k, (colour, what) in enumerate(((FROZEN, "frozen, from the base model"), (TRAINED, "trained"))):
        parts += [f'<rect x="740" y="{60 + 30 * k}" width="26" height="18" rx="3" fill="{colour}" '
                  'stroke="#777"/>', text(776, 74 + 30 * k, what, 13)]
    for corners, label, (x, y) in ARROWS:
        points = " ".join(f"{a},{b}" for a, b in corners)
        parts.append(f'<polyline points="{points}" fill="none" stroke="#555" stroke-width="1.5" '
                     'marker-end="url(#tip)"/>')
        parts += [text(x, y, label, 13)] if label else []
    for x, y, width, height, colour, lines in BOXES.values():
        stroke = "#bbb" if colour == PLAIN else "#777"
        parts.append(f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" '
                     f'fill="{"#fff" if colour == PLAIN else colour}" stroke="{stroke}"/>')
        top = y + height / 2 + 5 - 10 * (len(lines) - 1)
        parts += [text(x + width / 2, top + 20 * k, line, 14, 'text-anchor="middle"')
                  for k, line in enumerate(lines)]
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("method.svg").write_text(draw(), encoding="utf-8")
