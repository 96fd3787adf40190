"""``python -m scripts.bench.certificates``."""

from scripts.bench.certificates.certificates import app

if __name__ == "__main__":
    app()
