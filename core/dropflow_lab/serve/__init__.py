"""Serves a model under several policies through OpenAI's chat API; the parts about HTTP need the extra `serve`."""
