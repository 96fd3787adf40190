"""From files of any kind to examples as the trainer saw them: tokens, and which of them count."""
