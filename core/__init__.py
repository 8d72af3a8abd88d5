"""What every other package builds on: needs the standard library and numpy."""
