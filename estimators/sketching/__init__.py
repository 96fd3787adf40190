"""The index side: the coordinates in which training gradients are sketched."""
