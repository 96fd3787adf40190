"""``python -m scripts.bench.recall``."""

from scripts.bench.recall.recall import app

if __name__ == "__main__":
    app()
