"""From a query to a certified answer."""
