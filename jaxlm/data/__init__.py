"""What happens to text before it is an array, all of it on the host: tokenizers, sources, packing, mixing."""
