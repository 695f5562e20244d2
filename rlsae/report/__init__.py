"""The report of a study: a few static pages that open from disk."""
