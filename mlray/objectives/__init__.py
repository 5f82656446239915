"""What is learnt: a table of objectives and their losses."""
