"""What this machine has: GPUs, memory, images, engines and models; nothing is started or pulled."""
