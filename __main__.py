"""``python -m vpruner``: the command."""

from .cli import main

main(prog_name="vpruner")
