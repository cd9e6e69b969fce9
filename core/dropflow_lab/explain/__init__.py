"""What a policy will cost, what is installed, and one question side by side."""
