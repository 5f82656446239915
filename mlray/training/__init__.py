"""How it is trained: engine, loop, checkpoint, and the Ray Train run around them."""
