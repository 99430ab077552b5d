"""Which layer gets how many bits, on which device: losses, costs, and the program that decides."""
