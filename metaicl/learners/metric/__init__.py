"""Metric and closed-form learners."""
