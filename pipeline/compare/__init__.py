"""Compare methods of token reduction side by side."""
