"""What the analyses are made of: steering vectors, prompts, pairs of prompt sets, samples."""
