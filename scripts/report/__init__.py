"""Reports as pages with plots, to be read and passed on as files."""
