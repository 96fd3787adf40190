"""From a corpus to an index: the batch jobs."""
