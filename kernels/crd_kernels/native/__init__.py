"""C++ behind `impl="cpu"`: how it is built, and how it reads latents."""
