"""A 16-bit checkpoint -> a quantized one, layer by layer, on a model larger than memory."""
