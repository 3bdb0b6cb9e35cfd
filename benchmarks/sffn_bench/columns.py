"""Which columns of a benchmark's rows are shown, and the table of them. Standard library only."""

from __future__ import annotations

from typing import Any

TIMES = ("median_ms", "p20_ms", "p80_ms")
WORK = ("gflop", "gbytes", "floor_ms")
LAYER = ("kind", "share", "width", "tokens", "provider", "mode", *TIMES, "speedup_over_dense")
SENT = ("backward", "gradients", "without_sp_forward", "without_sp_backward")
TEXTS = ("part", "assumption")  # which begin at the left
EXACT = 10**7  # whole numbers below it are shown whole
COLUMNS = {
    "ffn": (*LAYER, "peak_mb", *WORK),
    "step": (*LAYER, "peak_mb", *WORK),
    "decode": (*LAYER, "layers", *WORK),
    "comm": ("kind", "p", "elements", "ratio_to_dense", *SENT),
    "tp": ("kind", "p", "sequence", "provider", *TIMES, "speedup_over_naive", "speedup_over_dense"),
    "guide": ("kind", "provider", *TIMES, "over_unguided", "over_dense", "speedup_over_three_passes"),
    "checkpoint": ("provider", "gigabytes", "first_ms", *TIMES, "over_sync", "total_s", "gb_per_s"),
    "roofline": ("part", "launches", "bytes", "flops", "ms", "mfu", "assumption"),
    "guards": ("provider", "config", "ranks", "steps", "step_ms", "calls", "median_ms", "share"),
}


def table_of(rows: list[dict[str, Any]], command: str) -> str:
    """The rows of a command as a table for a terminal."""
    columns = COLUMNS[command]

    def text(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.3f}".rstrip("0").rstrip(".") if value >= 0.1 or not value else f"{value:.3g}"
        if isinstance(value, int) and value >= EXACT:
            return f"{value:.4g}"
        return "-" if value is None else str(value)

    cells = [list(columns), *[[text(row[column]) for column in columns] for row in rows]]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]

    def line_of(line: list[str]) -> str:
        padded = (
            cell.ljust(width) if column in TEXTS else cell.rjust(width)
            for column, cell, width in zip(columns, line, widths, strict=True)
        )
        return "  ".join(padded).rstrip()

    return "\n".join(line_of(line) for line in cells)
