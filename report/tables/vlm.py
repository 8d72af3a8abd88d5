"""Tables of vision-language models with fewer visual tokens."""

from __future__ import annotations

from collections.abc import Sequence

from ...core.text import counted
from ..blocks import Table
from ..numbers import METRICS, estimate, milliseconds, ratio_of, size, three
from ..results import Row

TOWER = "tower MACs / dense"


def vlm_latency_table(rows: Sequence[Row]) -> Table:
    """Time to the first token, decoding and memory, one line for each way of pruning."""
    first = rows[0]
    lines = tuple(
        (
            row["label"],
            milliseconds(row["p50_ms"]),
            ratio_of(row),
            three(row["decode_tokens_per_s"]),
            ratio_of(row, "decode_ratio"),
            size(row["peak_memory_bytes"]),
            size(row["kv_bytes"]),
            f"{row['visual_tokens'][0]} to {row['visual_tokens'][-1]}",
            _tower(row, first),
        )
        for row in rows
    )
    header = ("", "first token, p50", "time / dense", "decoded tokens/s", "time / dense", "peak memory", "cache",
              "visual tokens", TOWER)  # fmt: skip
    prompt = counted(first["protocol"]["prompt_tokens"], "token")
    title = f"{first['model']}, {first['dtype']} on {first['device']}, batch {first['batch']}, prompts of {prompt}"
    return Table(header, lines, title)


def vlm_accuracy_tables(rows: Sequence[Row]) -> list[Table]:
    """Accuracy of answers, a table for each kind of question."""
    tables = []
    for kind in dict.fromkeys(row["question_kind"] for row in rows):
        some = [row for row in rows if row["question_kind"] == kind]
        found = {(row["label"], row["metric"]): row for row in some}
        metrics = ("accuracy", "accuracy_difference", "agreement")
        lines = tuple(
            (
                label,
                f"{found[label, 'accuracy']['visual_tokens']:.1f}",
                _tower(found[label, "accuracy"], some[0]),
                *(estimate(found.get((label, metric))) for metric in metrics),
            )
            for label in dict.fromkeys(row["label"] for row in some)
        )
        title = f"{some[0]['model']}, {counted(some[0]['count'], 'question')}{f' of kind {kind}' if kind else ''}"
        tables.append(Table(("", "visual tokens", TOWER, *(METRICS[metric] for metric in metrics)), lines, title))
    return tables


def _tower(row: Row, dense: Row) -> str:
    """Empty for rows of versions that did not count what the tower does."""
    return f"{row['tower']['macs'] / dense['tower']['macs']:.3f}" if {"tower"} <= row.keys() & dense.keys() else ""
