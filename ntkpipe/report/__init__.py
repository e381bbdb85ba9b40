"""One HTML page about a kernel store: data are gathered, put into words and figures, and on a page."""
