"""What a layer is, and which tokens the rows belong to that it multiplies."""
