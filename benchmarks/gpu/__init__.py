"""How near the GPU kernels come to what a GPU allows, beside torch's; and the search for tiles."""
