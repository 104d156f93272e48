"""Reports for people: one self-contained HTML file, or a table, from the report that the log gives."""
