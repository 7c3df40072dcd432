"""The engine: regions, the pager that serves them, and the commands."""
