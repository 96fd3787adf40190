"""A chat model with two planted personas, asked in chat form why it speaks as it does."""
