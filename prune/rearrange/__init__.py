"""Move tokens within a budget by reinforcement learning or by greedy swaps."""
