"""What a training step needs of a machine that is not at hand: memory, traffic and time, computed and compiled."""
