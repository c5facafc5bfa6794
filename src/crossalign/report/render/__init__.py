"""A page as HTML, as Markdown, and as lines for a terminal."""
