"""Sections of the page, each from what was gathered: tables, figures, and words on how to read them."""
