"""What one unit of score is worth: learnt from the trace of a recorded run."""
