"""Black-box in-context learners."""
