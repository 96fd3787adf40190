"""Commands about recorded runs: repeated, traced, and what their scores are worth."""
