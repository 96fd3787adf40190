"""Running sums over examples, of which curvature is made."""
