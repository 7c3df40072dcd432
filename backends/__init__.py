"""Stores: where pages go when they leave memory."""
