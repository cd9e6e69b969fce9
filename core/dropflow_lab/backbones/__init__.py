"""What every type of multimodal model in transformers gives a policy, found by building each in miniature."""
