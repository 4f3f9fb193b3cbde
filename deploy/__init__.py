"""Scripts and studies that ship with Consilium; no code."""
