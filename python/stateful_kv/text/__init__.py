"""From messages to tokens and back: templates, tokenizers, stop rules."""
