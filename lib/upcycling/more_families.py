"""More families (see families)."""

FAMILIES = {}
