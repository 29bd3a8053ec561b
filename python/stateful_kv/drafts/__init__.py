"""What to propose, and whether it pays."""
