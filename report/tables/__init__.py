"""Tables of what was measured, planned and found: the same ones for the terminal and for the page."""
