"""``python -m scripts.demo``."""

from scripts.demo.demo import app

if __name__ == "__main__":
    app()
