"""Retrieval-augmented learners and their memory."""
