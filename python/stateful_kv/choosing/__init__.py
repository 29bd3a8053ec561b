"""How tokens are chosen and drafts verified."""
