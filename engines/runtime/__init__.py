"""From an engine directory to answers: reading, a queue, the model, tokens, batches. `engine` joins them."""
