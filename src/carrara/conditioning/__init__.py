"""From what a user says (a digit, a caption) to the named slots of a `Condition`."""

from carrara.conditioning.labels import Labels

__all__ = ["Labels"]
