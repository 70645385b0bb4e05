"""What runs on an NVIDIA GPU: memory and streams, NVDEC, compiled networks. Imported only where a GPU is asked for."""
