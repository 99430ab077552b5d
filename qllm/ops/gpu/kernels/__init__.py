"""What runs on the GPU. Importing a module of this folder imports Triton."""
