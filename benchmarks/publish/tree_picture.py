"""Draws the tree of strategy `exact` for eight virtual ranks at world sizes 1, 2 and 4, as docs/exactness.md shows it.

    python benchmarks/publish/tree_picture.py docs/tree.svg

Contract: the same bytes every time, from nothing but this file. A node has the colour of the rank that adds it up; one
that several ranks add up, each in its own shard, has a stripe for each. The background is opaque, for light and dark
pages.
"""

from __future__ import annotations

import argparse
from pathlib import Path

VIRTUAL_RANKS = 8
WORLD_SIZES = (1, 2, 4)

COLOURS = ("#c2410c", "#1d4ed8", "#047857", "#7e22ce")
INK, FAINT, EDGE = "#1e293b", "#f1f5f9", "#64748b"
MARGIN, PANEL_WIDTH, HEIGHT = 12, 382, 488
WIDTH = 2 * MARGIN + len(WORLD_SIZES) * PANEL_WIDTH
LEAF_GAP, LEAF_Y, LEVEL_HEIGHT = 46, 322, 72
NODE_WIDTH, NODE_HEIGHT, BOX_PAD = 36, 28, 21
"""Pixels; y grows downwards, nodes are placed by their centres."""


def text(x: float, y: float, words: str, *, fill: str = INK, bold: bool = False) -> str:
    weight = " font-weight='bold'" if bold else ""
    return f"<text x='{x:g}' y='{y:g}' fill='{fill}'{weight}>{words}</text>"


def arrow(start: tuple[float, float], end: tuple[float, float], *, travels: bool) -> str:
    """From a node to the sum that it goes into."""
    dashes = " stroke-dasharray='5 4'" if travels else ""
    return (
        f"<line x1='{start[0]:g}' y1='{start[1]:g}' x2='{end[0]:g}' y2='{end[1]:g}' stroke='{EDGE}'"
        f" stroke-width='1.8'{dashes} marker-end='url(#head)'/>"
    )


def node(x: float, y: float, label: str, ranks: range) -> str:
    stripe = NODE_WIDTH / len(ranks)
    stripes = "".join(
        f"<rect x='{x - NODE_WIDTH / 2 + i * stripe:g}' y='{y - NODE_HEIGHT / 2:g}' width='{stripe:g}'"
        f" height='{NODE_HEIGHT}' fill='{COLOURS[rank]}'/>"
        for i, rank in enumerate(ranks)
    )
    return stripes + text(x, y + 5, label, fill="white", bold=True)


def panel(left: float, world_size: int) -> list[str]:
    """One tree; each rank is a box around what it adds up by itself."""
    local = VIRTUAL_RANKS // world_size
    first_x, middle = left + (PANEL_WIDTH - (VIRTUAL_RANKS - 1) * LEAF_GAP) / 2, left + PANEL_WIDTH / 2
    parts = [text(middle, 30, f"world size {world_size}", bold=True)]
    for rank in range(world_size):
        x, width = first_x + rank * local * LEAF_GAP, (local - 1) * LEAF_GAP
        top = LEAF_Y - (local.bit_length() - 1) * LEVEL_HEIGHT - 24
        parts += [
            f"<rect x='{x - BOX_PAD:g}' y='{top}' width='{width + 2 * BOX_PAD}' height='{LEAF_Y + 52 - top}' rx='8'"
            f" fill='{FAINT}' stroke='{COLOURS[rank]}' stroke-width='1.5'/>",
            text(x + width / 2, LEAF_Y + 40, f"rank {rank}", fill=COLOURS[rank], bold=True),
        ]

    span, y = 1, LEAF_Y  # virtual ranks below each node of the level, and where the level is
    while span <= VIRTUAL_RANKS:
        for first in range(0, VIRTUAL_RANKS, span):
            x = first_x + (first + (span - 1) / 2) * LEAF_GAP
            rank = first // local
            adds = range(rank, rank + 1) if span <= local else range(world_size)
            if span < VIRTUAL_RANKS:
                is_left = first % (2 * span) == 0
                parent_x = x + (span if is_left else -span) / 2 * LEAF_GAP
                side = parent_x + (-NODE_WIDTH / 4 if is_left else NODE_WIDTH / 4)
                end = (side, y - LEVEL_HEIGHT + NODE_HEIGHT / 2 + 2)
                parts.append(arrow((x, y - NODE_HEIGHT / 2), end, travels=span == local))
            parts.append(node(x, y, f"v{first}" if span == 1 else "+", adds))
        span, y = 2 * span, y - LEVEL_HEIGHT
    parts.append(text(middle, y + LEVEL_HEIGHT - 36, "divided by 8: the gradient of the step"))
    times = 2 * (world_size - 1) / world_size
    sent = f"each rank sends {times:g} x the gradient's bytes" if times else "nothing is sent"
    return [*parts, text(middle, LEAF_Y + 80, sent)]


def picture() -> str:
    """The whole picture as SVG."""
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {HEIGHT}' width='{WIDTH}' height='{HEIGHT}'"
        " font-family='Helvetica, Arial, DejaVu Sans, sans-serif' font-size='15' text-anchor='middle' role='img'"
        " aria-label='One tree of eight leaves, shared out to one, two and four ranks'>",
        "<defs><marker id='head' viewBox='0 0 8 8' refX='7' refY='4' markerWidth='5' markerHeight='5' orient='auto'>"
        f"<path d='M0 0 L8 4 L0 8 Z' fill='{EDGE}'/></marker></defs>",
        f"<rect width='{WIDTH}' height='{HEIGHT}' fill='white'/>",
    ]
    for place, world_size in enumerate(WORLD_SIZES):
        parts += panel(MARGIN + place * PANEL_WIDTH, world_size)
    legend = (
        "v0 to v7 are the gradients of the virtual ranks. A colour is a rank. Dashed arrows travel: the all-to-all.",
        "A striped sum is added up by all ranks, each in its own shard; the all-gather then hands the shards round.",
    )
    parts += [text(WIDTH / 2, HEIGHT - 44 + 24 * i, words) for i, words in enumerate(legend)]
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("picture", type=Path, help="SVG file to write")
    parser.parse_args().picture.write_text(picture(), encoding="utf-8")


if __name__ == "__main__":
    main()
