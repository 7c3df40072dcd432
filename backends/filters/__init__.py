"""Filters: stores over a store, each of which adds one thing and passes everything else on."""
