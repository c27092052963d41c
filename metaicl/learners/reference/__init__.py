"""Learners without meta-training, to measure against."""
