"""Swap in user space: a program's memory, paged to a store of your choice within a budget."""

__version__ = "0.1.0"
