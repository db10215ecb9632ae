"""What a training step of every variation costs in time, memory, operations and energy."""
