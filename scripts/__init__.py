"""Commands: thin, run with ``etymon NAME``; the last line on stdout is one JSON line."""
