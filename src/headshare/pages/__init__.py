"""Pages for people: figures as SVG and self-contained pages in HTML, all in one style.

This package knows neither models nor plans. Its callers give it names and numbers, which strangers may have written:
everything that it shows is escaped.
"""
