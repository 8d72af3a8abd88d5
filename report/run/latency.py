"""Times of a run, with how and on what they were taken."""

from __future__ import annotations

from ..blocks import Block, Section, Text
from ..facts import protocol_blocks
from ..results import Results
from ..tables.latency import latency_table, timed_alike
from ..tables.run import gates_table, prediction_table


def latency_section(results: Results) -> Section:
    rows = results.latencies
    if not rows:
        return Section("Latency", [Text("Not measured.")])
    alike = timed_alike(rows)
    blocks: list[Block] = [latency_table(rows, f"timed with {alike}" if alike else "")]
    if table := prediction_table(results.last("prediction")):
        text = "Judge a table by the ratio: milliseconds drift with the machine, the ratio hardly does."
        blocks += [table, Text(text)]
    if table := gates_table(results.last("gates")):
        text = (
            "Gates are constants that the attention of each block adds. The row “ungated” above is the same graph "
            "without them, timed in turns with it."
        )
        blocks += [table, Text(text)]
    return Section("Latency", [*blocks, *protocol_blocks(rows)])
