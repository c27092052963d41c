"""The checks behind `metaicl.testing`."""
