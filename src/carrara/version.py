"""The version, for whatever is saved or measured."""

__version__ = "0.1.0"
