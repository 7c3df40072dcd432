"""Policies: pure code that names victims and pages to read ahead."""
