"""What developers run: descriptions and pictures that the repository keeps."""
