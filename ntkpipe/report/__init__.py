"""One HTML page about a kernel store: data are gathered, drawn and put on a page by modules of their own."""
