"""Tools of the developers of this project; not installed."""
