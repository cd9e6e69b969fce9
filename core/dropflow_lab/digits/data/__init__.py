"""The digits questions: glyphs, scenes, questions and dialogues."""
