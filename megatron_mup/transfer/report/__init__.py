"""The report of a sweep: Markdown, one self-contained page, and figures fit for a paper."""
