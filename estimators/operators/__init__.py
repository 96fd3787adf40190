"""The query side: from a query's gradient to a direction, one operator a file."""
