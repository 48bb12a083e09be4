"""Text from models: processors of logits, the compiled loop, generation and scoring."""
