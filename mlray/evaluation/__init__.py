"""How good it is: metrics per language, with intervals, and the report that every decision reads."""
