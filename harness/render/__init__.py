"""Results as text for people: sentences, tables, Markdown."""
