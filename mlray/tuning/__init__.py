"""What is chosen by trying: fine-tuning a backbone and judging it, and searches over its parameters."""
