"""Boxes in a row, with arrows between them, as text."""

from collections.abc import Sequence

from rich.cells import cell_len, set_cell_size

ARROW = "→"
BAR = "▏▎▍▌▋▊▉█"
FULL = "█"


def boxes(contents: Sequence[Sequence[str]], width: int) -> list[str]:
    """Boxes of equal size from left to right, with an arrow to the next; as many in a row as `width` has room for.

    Args:
        contents: of each box, its lines.
    """
    inner = max((cell_len(line) for lines in contents for line in lines), default=0)
    height = max((len(lines) for lines in contents), default=0)
    each = inner + 5  # two borders, two blanks, an arrow
    per_row = max(1, (width + 1) // each)
    drawn: list[str] = []
    for first in range(0, len(contents), per_row):
        row = contents[first : first + per_row]
        more = first + per_row < len(contents)
        drawn.append(" ".join(f"╭{'─' * (inner + 2)}╮" for _ in row))
        for i in range(height):
            middle = i == height // 2
            cells = [f"│ {set_cell_size(lines[i] if i < len(lines) else '', inner)} │" for lines in row]
            drawn.append((ARROW if middle else " ").join(cells) + (ARROW if more and middle else ""))
        drawn.append(" ".join(f"╰{'─' * (inner + 2)}╯" for _ in row))
    return [line.rstrip() for line in drawn]


def bar(share: float, width: int) -> str:
    """A bar as long as `share` of `width`, to an eighth of a character."""
    eighths = round(8 * width * min(1.0, max(0.0, share)))
    full, rest = divmod(eighths, 8)
    return (FULL * full + (BAR[rest - 1] if rest else "")).ljust(width)
