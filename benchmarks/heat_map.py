"""A heat map as SVG text: columns by name, rows by name, shares from 0 to 1 in the cells."""

from collections.abc import Mapping, Sequence

CELL, LEFT, TOP = (72, 28), 56, 28


def svg(columns: Mapping[str, Sequence[float | None]], rows: Sequence[str]) -> str:
    """From red at 0 to green at 1, the share written in each cell; None stays empty."""
    width, height = LEFT + CELL[0] * len(columns), TOP + CELL[1] * len(rows)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="12" text-anchor="middle">'
    ]
    parts += [_text(LEFT - 28, TOP + CELL[1] * (y + 0.6), name) for y, name in enumerate(rows)]
    for x, (name, shares) in enumerate(columns.items()):
        left = LEFT + CELL[0] * x
        parts.append(_text(left + CELL[0] / 2, TOP - 10, name))
        for y, share in enumerate(shares):
            if share is not None:
                top = TOP + CELL[1] * y
                colour = f"hsl({120 * share:.0f}, 60%, 75%)"
                parts.append(f'<rect x="{left}" y="{top}" width="{CELL[0]}" height="{CELL[1]}" fill="{colour}"/>')
                parts.append(_text(left + CELL[0] / 2, top + CELL[1] * 0.6, f"{share:.1%}".replace(".0%", "%")))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _text(x: float, y: float, words: str) -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" fill="#888">{words}</text>'
