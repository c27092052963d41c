"""The page."""

from metaicl.findings import Findings


def render_page(findings: Findings) -> str:
    """One page."""
    return ""
