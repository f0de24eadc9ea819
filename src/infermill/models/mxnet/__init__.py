"""MXNet checkpoints: read without MXNet, and translated to ONNX."""
