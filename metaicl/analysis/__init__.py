"""The microscope: which algorithm did a learner learn, where does it keep what it knows, and when did it learn it."""
