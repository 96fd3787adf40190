"""Questions traced through recorded runs."""
