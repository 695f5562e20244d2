"""The tables and figures of arXiv 2310.08164 from whatever studies have been run, the published numbers beside ours."""
