"""What only a real GPU can show: `bash tests/gpu.sh`. Each function of the modules here is a part of the report."""
