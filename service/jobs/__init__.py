"""Jobs: many queries, kept in a file and answered in the background."""
