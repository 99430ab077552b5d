"""Read and write checkpoints: streaming, strict, atomic."""
