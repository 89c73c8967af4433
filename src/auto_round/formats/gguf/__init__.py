"""GGUF files, as llama.cpp and all that is built on it read them: writer, reader, mixing rules, tokenizer, keys."""
