"""What is measured on: questions, pictures, models and prompts."""
