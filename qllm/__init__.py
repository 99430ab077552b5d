"""QLLM: OPT, BLOOM and Llama with their linear layers held at 1 to 8 bits, or 16."""

__version__ = "0.1.0"
