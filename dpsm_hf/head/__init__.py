"""From hidden states to loss and gradients, chunk by chunk, without a tensor of logits."""
