"""Pages for a browser: the report of a run, and the local page for one photograph at a time."""
