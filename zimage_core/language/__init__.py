"""Writing text with the language model that a text encoder is: generation, sampling, prompts written anew."""
