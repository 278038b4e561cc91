"""Fine-tuning of the Pilot: Ray Train workers, DeepSpeed, and the record each round leaves."""
