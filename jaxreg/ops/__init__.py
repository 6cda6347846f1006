"""Forward passes that produce an activation and its penalty in one pass."""

from .dense import dense as dense
