"""Sections of the page, each from what was gathered: tables, figures that are drawn, and words on how to read them."""
