"""What is trained: tokenizers and backbones."""
