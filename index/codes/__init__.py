"""How rows are stored in few bytes and estimated from them."""
