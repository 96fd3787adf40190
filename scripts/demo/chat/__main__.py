"""``python -m scripts.demo.chat``."""

from scripts.demo.chat.demo import app

if __name__ == "__main__":
    app()
