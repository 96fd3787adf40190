"""Commands: thin, run with ``python -m scripts.NAME``; the last line on stdout is one JSON line."""
