"""What a command does, as functions: only here pruning, export, runtime and report are joined."""
